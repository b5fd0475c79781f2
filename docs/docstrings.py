"""Shows the `Example:` of a docstring as code, in whichever of the two forms it is indented."""

import re

import griffe

EXAMPLE = re.compile(
    r"^( *)Example:\n((?:\s*\n| *(?:>>>|\.\.\.).*\n?| *\S.*\n?)+?)(?=\n *\S[^\n]*:\n|\Z)", re.MULTILINE
)


def with_section(text: str) -> str:
    """`Example:` as the section `Examples:`, indented below its title."""

    def section(match: re.Match) -> str:
        body = [line.strip("\n") for line in match[2].strip("\n").split("\n")]
        margin = min(len(line) - len(line.lstrip()) for line in body if line.strip())
        lines = [f"{match[1]}    {line[margin:]}".rstrip() for line in body]
        return "\n".join([f"{match[1]}Examples:", *lines, ""])

    return EXAMPLE.sub(section, text)


class Examples(griffe.Extension):
    """Rewrites the docstrings of all objects."""

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            obj.docstring.value = with_section(obj.docstring.value)
