"""Fills the pages whose text stands elsewhere: options in the config, the changelog at the top of the repository."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from moeca_compile.config import RECIPES, MoecaConfig
from moeca_compile.options import NotAllowedError

PLACE = "<!-- filled when the site is built -->"
"""Where a page has the text that stands elsewhere."""

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"

RECIPE = ("Recipe", "What cache steps reuse. It also sets the values of options that are left unset.")

_PROBES: tuple[object, ...] = ((), (object(),), object())
"""Values that checks refuse. An empty list comes first: the refusal of one says the most of a list's items."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    text = FILLED.get(page.file.src_uri)
    return markdown.replace(PLACE, text()) if text else markdown


def changelog_markdown() -> str:
    """The changelog, whose links start at the top of the repository, with links that start at the site's."""
    return CHANGELOG.read_text().replace("](docs/", "](")


def options_markdown() -> str:
    """All options, group by group, each with an anchor of its name."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(MoecaConfig):
        group, doc = RECIPE if field.name == "recipe" else (field.metadata["group"], field.metadata["doc"])
        groups.setdefault(group, []).append(_option(field, doc))
    return "\n\n".join(part for group, texts in groups.items() for part in (f"## {group}", *texts))


def _option(field: dataclasses.Field[Any], doc: str) -> str:
    facts = f"**Allowed:** {_allowed(field)}. **Default:** {_code(_default(field))}{_presets(field)}.{_users(field)}"
    table = _recipes() if field.name == "recipe" else ""
    return f"### `{field.name}` {{ #{field.name} }}\n\n{_marked(doc)}\n\n{facts}{table}"


def _recipes() -> str:
    """What each recipe reuses, where its policy says so."""
    reused: dict[str, list[str]] = {}
    for name, policy in RECIPES.items():
        reused.setdefault(policy.reuses, []).append(name)
    rows = [f"| {', '.join(map(_code, names))} | {what} |" for what, names in reused.items() if what]
    return "\n\n" + "\n".join(["| recipe | a cache step reuses |", "|---|---|", *rows]) if rows else ""


def _allowed(field: dataclasses.Field[Any]) -> str:
    if field.name == "recipe":
        return ", ".join(map(_code, RECIPES))
    for value in _PROBES:
        try:
            field.metadata["check"](value)
        except NotAllowedError as error:
            text = re.sub(r"in (.)0, inf\)", lambda end: ">= 0" if end[1] == "[" else "> 0", str(error))
            return re.sub(r"'[\w.-]+'|torch\.\w+|\b(?:None|True|False)\b", _in_code, text).replace(" | ", ", ")
    raise ValueError(f"the check of {field.name!r} takes whatever it is given")


def _in_code(found: re.Match[str]) -> str:
    return f"`{found[0]}`".replace("'", '"')


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.metadata.get("default", field.default)


def _presets(field: dataclasses.Field[Any]) -> str:
    """What recipes set in place of the default."""
    if field.name == "recipe":
        return ""
    values = {name: getattr(MoecaConfig(recipe=name), field.name) for name in RECIPES}
    others = [f"{_code(value)} in {_code(name)}" for name, value in values.items() if value != _default(field)]
    return "; " + ", ".join(others) if others else ""


def _users(field: dataclasses.Field[Any]) -> str:
    """Which recipes heed the option, where not all of them do."""
    heed = [name for name, policy in RECIPES.items() if field.name in policy.options]
    if field.name == "recipe" or len(heed) == len(RECIPES):
        return ""
    but_none = {*RECIPES} - {*heed} == {"none"}
    names = 'all but `"none"`' if but_none else ", ".join(map(_code, heed))
    return f" **For:** {names}."


def _code(value: Any) -> str:
    return f"`{value!r}`".replace("'", '"')


def _marked(doc: str) -> str:
    """The doc as Markdown: values and the names of options in code, where they are not yet."""
    names = "|".join(field.name for field in dataclasses.fields(MoecaConfig) if "_" in field.name)
    plain, *rest = re.split("(`[^`]*`)", " ".join(doc.split()))
    parts = [plain[:1].upper() + plain[1:] if plain[1:2].isalpha() else plain, *rest]
    parts[::2] = [re.sub(rf'"[\w-]+"|\b(?:None|{names})\b', _in_code, part) for part in parts[::2]]
    return "".join(parts)


FILLED = {"options.md": options_markdown, "changelog.md": changelog_markdown}
"""Pages with a PLACE, and what fills it."""
