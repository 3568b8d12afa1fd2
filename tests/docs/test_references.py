"""What the documentation refers to exists: links and their anchors, files, folders, modules and names in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = [ROOT / name for name in ("bench", "docs", "examples", "moeca_compile", "tests")]
FENCE = re.compile(r"^(```|<!-- setup).*?^(```|-->)$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s\[\]]+)\)")
FILE = re.compile(r"(?<![\w/.:-])(?:[\w-]+/)*[\w-]+\.(?:py|md|cpp|csv|png|svg|toml|yml|safetensors)\b(?!:\d)")
FOLDER = re.compile(r"`((?:[\w.-]+/)+)`")
MODULE = re.compile(r"\b(?:moeca_compile|bench|tests|examples)(?:\.[A-Za-z_]\w*)+")


def prose(page: Path) -> str:
    """The page without its code blocks, which name files that a reader is to write."""
    return FENCE.sub("", page.read_text())


def broken(page: Path) -> list[str]:
    """What the page refers to and does not exist."""
    return [*_broken_links(page), *_missing_paths(page), *_missing_names(page)]


def _broken_links(page: Path) -> Iterator[str]:
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def _missing_paths(page: Path) -> Iterator[str]:
    text = LINK.sub("", prose(page))
    for path in {*FILE.findall(text), *FOLDER.findall(text)}:
        places = (ROOT, ROOT / "moeca_compile", page.parent)
        anywhere = "/" not in path and any(next(folder.rglob(path), None) for folder in FOLDERS)
        if not anywhere and not any((place / path).exists() for place in places):
            yield path


def _missing_names(page: Path) -> Iterator[str]:
    """Dotted names that are neither a module nor a name in the code of one."""
    for name in set(MODULE.findall(prose(page))):
        *parent, last = name.split(".")
        if name.endswith((".py", ".md")) or _source(name.split(".")) is not None:
            continue
        source = _source(parent)
        if source is None or not re.search(rf"\b{last}\b", source):
            yield name


def _source(parts: list[str]) -> str | None:
    path = ROOT.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text() if file.exists() else "" if path.is_dir() else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_refers_to_exists(page):
    assert broken(page) == []


@pytest.mark.parametrize("folder", ["bench", "moeca_compile"])
def test_pages_that_warnings_and_docstrings_name_exist(folder):
    named = {
        (str(file.relative_to(ROOT)), page)
        for file in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text())
    }
    assert len(named) > 0
    assert [each for each in sorted(named) if not (ROOT / each[1]).exists()] == []


FAULTS = {
    "a page that is not there": ("[it](nowhere.md)", "nowhere.md"),
    "an anchor that is not there": ("# Here\n[it](#there)", "#there"),
    "a file that moved": ("see `capture/recognize.py`", "capture/recognize.py"),
    "a file of no such name": ("see `recognize.py`", "recognize.py"),
    "a file outside code": ("run examples/digits/draw.py", "examples/digits/draw.py"),
    "a folder": ("in `capture/recognizers/`", "capture/recognizers/"),
    "a module": ("python -m bench.times", "bench.times"),
    "a name": ("call `moeca_compile.explain(model)`", "moeca_compile.explain"),
    "a name in a module": ("`moeca_compile.config.NoConfig`", "moeca_compile.config.NoConfig"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path):
    text, found = FAULTS[fault]
    page = tmp_path / "page.md"
    page.write_text(text)
    assert broken(page) == [found]


def test_what_is_there_is_no_fault(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, and more\n[a](#a-page-and-more) [b](page.md) [c](https://example.org/x.py) `capture/idioms/`\n"
        "`moeca_compile/backend.py` `mask_loop.py` bench.speed `moeca_compile.report(model)`\n"
        "```python title='moeca_compile/new.py'\nimport moeca_compile.new\n```\n"
    )
    assert broken(page) == []
