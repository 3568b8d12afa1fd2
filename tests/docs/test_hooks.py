"""Pages whose text stands elsewhere: options in the config, the changelog at the top of the repository."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import moeca_compile.backend  # noqa: F401
from moeca_compile.config import MoecaConfig
from tests.docs.test_references import LINK

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("moeca_docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sections(hooks) -> dict[str, str]:
    """The text of each option on the page, by name."""
    parts = re.split(r"^### `(\w+)` \{ #\1 \}$", hooks.options_markdown(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_option_has_its_text_and_what_is_allowed(sections):
    assert set(sections) == {field.name for field in dataclasses.fields(MoecaConfig)}
    for name, text in sections.items():
        doc, facts, *_ = text.strip().split("\n\n")
        assert len(doc.split()) > 3, name
        assert re.match(r"\*\*Allowed:\*\* .+\. \*\*Default:\*\* `.+`", facts), name


def test_allowed_values_defaults_and_presets_are_those_of_the_config(sections):
    assert '**Allowed:** `"all"`, `"chosen"`, `"none"`. **Default:** `"chosen"`.' in sections["keys_values"]
    assert "**Allowed:** `None` or a finite number in [0, 1]." in sections["budget"]
    assert '**Default:** `None`; `0.0` in `"moeca-forecast"`.' in sections["budget"]
    assert "**Allowed:** a finite number >= 0." in sections["tau0"]


def filled(hooks, path: str) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=path))
    return hooks.on_page_markdown((ROOT / "docs" / path).read_text(), page)


def test_only_pages_with_text_from_elsewhere_are_changed(hooks):
    assert filled(hooks, "limits.md") == (ROOT / "docs" / "limits.md").read_text()
    assert "`full_every`" in filled(hooks, "options.md")
    assert filled(hooks, "changelog.md").startswith("# Changelog")
    assert not any(hooks.PLACE in filled(hooks, path) for path in hooks.FILLED)


def test_links_of_the_changelog_lead_to_pages_of_the_site(hooks):
    links = [link for link in LINK.findall(filled(hooks, "changelog.md")) if "://" not in link]
    assert len(links) > 0
    assert [link for link in links if not (ROOT / "docs" / link.partition("#")[0]).exists()] == []
