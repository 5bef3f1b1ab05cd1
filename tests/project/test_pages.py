"""docs/glossary.md defines each noun once, in alphabetical order, and the files that pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.tools.check_layout import read_nouns

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "glossary.md").read_text()
PAGES = [page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if page.name != "CHANGELOG.md"]
"""All but the one that names what there was."""
FILES = re.compile(r"`((?:node|protocol|torch_bridge|scripts|tests|examples|docs)/[\w./-]+)`")
TABLES = [re.findall(r"^\| (.+?) \| (.+?) \|", part, re.MULTILINE)[2:] for part in PAGE.split("\n## ")[1:]]


@pytest.mark.parametrize("rows", TABLES, ids=["terms", "words"])
def test_terms_stand_in_alphabetical_order_each_with_its_meaning(rows: list[tuple[str, str]]) -> None:
    terms = [term.lower() for term, _ in rows]
    assert terms == sorted(terms)
    assert all(meaning.strip() for _, meaning in rows)


def test_each_noun_is_defined_once() -> None:
    nouns = [noun.strip().lower() for rows in TABLES for term, _ in rows for noun in term.split(",")]
    assert sorted({noun for noun in nouns if nouns.count(noun) > 1}) == []


def test_the_checker_reads_the_first_columns() -> None:
    nouns = read_nouns(PAGE)
    assert {"eviction", "piece", "layer", "settings", "wire"} <= nouns
    assert "deleting" not in nouns, "a word of a meaning"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = set(FILES.findall(page.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
