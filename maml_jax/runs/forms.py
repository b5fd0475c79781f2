"""Forms of JSON files that are read back, checked with one message."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

from maml_jax.runs.files import WorkdirError

NAMES = {
    dict: "an object",
    list: "a list with entries",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    NoneType: "null",
}

ABSENT = ()
"""Form of an entry that must not exist, such as `{"*": ABSENT}` for all other entries."""


def check_form(path: Path, content: Any, form: Any) -> None:
    """Checks the content of a JSON file.

    Args:
      path: the file, for the message.
      content: the content.
      form: a type or a union of types; `{name: form}` for an object with these entries, and with any others; `[form]`
        for a list that is not empty. An entry whose name ends in `?` may be missing. The name `*` stands for all other
        entries. An integer also counts as a float.

    Raises:
      WorkdirError: if the content has another form. The message names all entries that differ.

    Example:
      >>> check_form(Path("run.json"), {"steps": "many"}, {"steps": int, "seeds": [int], "name?": str})
      Traceback (most recent call last):
      ...
      maml_jax.runs.files.WorkdirError: run.json has another form: seeds is missing; steps must be an integer, but is
      'many'. Restore the file, or move it away.
    """
    if found := _differences(content, form, ""):
        raise WorkdirError(f"{path} has another form: {'; '.join(found)}. Restore the file, or move it away.")


def _differences(content: Any, form: Any, where: str) -> list[str]:
    if isinstance(form, dict):
        if not isinstance(content, dict):
            return [_wrong(content, dict, where)]
        named = {name.removesuffix("?"): each for name, each in form.items() if name != "*"}
        missing = [name for name in form if not name.endswith("?") and name != "*" and name not in content]
        found = [f"{_below(where, name)} is missing" for name in missing]
        for name, value in content.items():
            if name in named or "*" in form:
                found += _differences(value, named.get(name, form.get("*")), _below(where, name))
        return found
    if isinstance(form, list):
        if not isinstance(content, list) or not content:
            return [_wrong(content, list, where)]
        return [each for i, value in enumerate(content) for each in _differences(value, form[0], f"{where}[{i}]")]
    if form is ABSENT:
        return [f"{where} is unknown"]
    types = get_args(form) if isinstance(form, UnionType) else (form,)
    types += (int,) if float in types else ()
    if isinstance(content, bool) and object not in types:  # In Python, True is an integer.
        types = tuple(each for each in types if each is bool)
    fits = isinstance(content, types)
    return [] if fits else [_wrong(content, form, where)]


def _wrong(content: Any, form: Any, where: str) -> str:
    types = get_args(form) if isinstance(form, UnionType) else (form,)
    expected = " or ".join(NAMES[each] for each in types)
    shown = repr(content) if len(repr(content)) <= 60 else f"{repr(content)[:60]}..."
    return f"{where or 'the content'} must be {expected}, but is {shown}"


def _below(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
