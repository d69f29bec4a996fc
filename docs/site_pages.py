"""A hook of mkdocs: README.md and its siblings at the root of the repository become pages of the site.

They stay where readers of the repository look for them, and their links into docs/ are rewritten for the site. The
site's tables take a pipe inside code as it is, where GitHub's need a backslash before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
_DOCS_LINK = re.compile(r"\]\(docs/")
_CODE = re.compile(r"`[^`\n]+`")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files of docs/ and one generated page for each entry of PAGES."""
    for page, source in PAGES.items():
        text = _DOCS_LINK.sub("](", (ROOT / source).read_text("utf-8"))
        for name, other in PAGES.items():
            text = text.replace(f"]({other})", f"]({name})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The text of a page with plain pipes in code."""
    return _CODE.sub(lambda code: code[0].replace(r"\|", "|"), markdown)
