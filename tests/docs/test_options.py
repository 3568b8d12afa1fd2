"""The page of options is built from the config."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

import moeca_compile.backend  # noqa: F401
from moeca_compile.config import MoecaConfig

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


def test_only_the_page_of_options_is_changed(hooks):
    class Page:
        def __init__(self, path: str) -> None:
            self.file = type("File", (), {"src_uri": path})

    assert hooks.on_page_markdown(hooks.PLACE, Page("limits.md")) == hooks.PLACE
    assert "`full_every`" in hooks.on_page_markdown(hooks.PLACE, Page("options.md"))
    assert hooks.PLACE in (ROOT / "docs" / "options.md").read_text()
