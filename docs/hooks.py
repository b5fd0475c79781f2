"""Serves figures of results/ on the site: pages link them as `../results/NAME.png`, which works on a code host too."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./(results/[\w./+-]+\.png)\)")


def on_files(files, config):
    pages = [file for file in files.documentation_pages() if file.src_uri.count("/") == 0]
    for name in sorted({name for page in pages for name in LINK.findall(page.content_string)}):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    return LINK.sub(r"](\1)", markdown)
