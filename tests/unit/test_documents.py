"""A reader of the repository or of the site finds every document, and everything that a document names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeconv.prune.criteria import CRITERIA
from moeconv.quantize.formats import FORMATS
from moeconv.upcycle.methods import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
_LINK = re.compile(r"\]\((?P<file>[^)#\s:]*)(?:#(?P<anchor>[^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PATH = re.compile(r"`((?:moeconv|tests|docs|benchmarks|\.ci|\.github)/[\w./-]*)(?: [^`]*)?`")
_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def pages_of(nav: Any) -> Iterator[str]:
    """The files that a nav of mkdocs names, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def generated_pages() -> dict[str, str]:
    """The pages that docs/site_pages.py makes of files outside docs/: {page: file}. mkdocs need not be installed."""
    for node in ast.parse((DOCS / "site_pages.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAGES":
            return ast.literal_eval(node.value)
    raise AssertionError("docs/site_pages.py has no PAGES")


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return _FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub and mkdocs form them."""
    found = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in _HEADING.findall(prose(text)))
    return {heading.replace(" ", "-") for heading in found}


def test_the_site_has_every_document_once():
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    written = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*written, *generated_pages()])
    assert all((ROOT / file).is_file() for file in generated_pages().values())


def test_the_index_of_decisions_names_every_page():
    folder = DOCS / "decisions"
    linked = {match["file"] for match in _LINK.finditer((folder / "index.md").read_text("utf-8"))}
    assert linked == {page.name for page in folder.glob("*.md")} - {"index.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_of_a_document_lead_somewhere(document):
    text = prose(document.read_text("utf-8"))
    broken = []
    for match in _LINK.finditer(text):
        target = (document.parent / match["file"]) if match["file"] else document
        known = target.exists() and (not match["anchor"] or match["anchor"] in anchors(target.read_text("utf-8")))
        if not known:
            broken.append(match[0])
    broken += [path for path in _PATH.findall(text) if not (ROOT / path).exists()]
    assert broken == []


def test_the_page_of_a_verb_names_what_its_registry_has():
    named = {page: set(re.findall(r"`([\w.-]+)`", (DOCS / page).read_text("utf-8"))) for page in
             ("prune.md", "upcycle.md", "quantize.md")}  # fmt: skip
    schemes = {scheme for f in FORMATS.values() for scheme in f.names}
    assert set(CRITERIA) <= named["prune.md"]
    assert set(METHODS) <= named["upcycle.md"]
    assert {*FORMATS, *schemes} <= named["quantize.md"]
