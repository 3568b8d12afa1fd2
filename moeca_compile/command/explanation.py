"""An explanation as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moeca_compile.command.explain import Choice, Explanation
from moeca_compile.reporting.report import KINDS, Region
from moeca_compile.text import aligned, binary_bytes, count, flop_count, plural

_NOUNS = {"router": "router", "experts": "MoE layer", "attention": "attention", "feedforward": "feed-forward"}
_HEADINGS = ("recipe", "caches", "a stream", "full step", "cache step")
_NOTHING = "nothing was recognized that could be cached: the model runs as under plain torch.compile"


def text_of(found: Explanation) -> str:
    breaks = plural(len(found.graph_breaks), "graph break") if found.graph_breaks else "no graph breaks"
    lines = [
        f"{found.model}, {count(found.parameters)} parameters, {found.device}, {found.dtype}",
        f"{plural(found.graphs, 'graph')}, {breaks}",
        *(f"  {each.where}: {each.reason}" for each in found.graph_breaks),
        f"timestep: {' or '.join(dict.fromkeys(found.timesteps)) or 'not found'}",
        "",
        *(aligned([_HEADINGS, *map(_row, found.choices)]) if any(c.regions for c in found.choices) else [_NOTHING]),
        *_left(found),
        *(f"warning: {warning}" for warning in found.warnings),
    ]
    return "\n".join(lines)


def _row(choice: Choice) -> tuple[str, ...]:
    cached = Counter(region.kind for region in choice.regions if region.status == "cached")
    kinds = [plural(cached[kind], _NOUNS[kind]) for kind in KINDS if cached[kind]]
    step = flop_count(choice.least) if choice.cache_bytes else "-"
    if choice.cache_bytes and choice.most > choice.least:
        step += f" to {flop_count(choice.most)}"
    bytes_ = binary_bytes(choice.cache_bytes) if choice.cache_bytes else "-"
    return choice.recipe, ", ".join(kinds) or "nothing", bytes_, flop_count(choice.full_step), step


def _left(found: Explanation) -> Iterator[str]:
    """What runs at every step and why, with the recipes under which it does, where these are not all."""
    caching = [choice for choice in found.choices if choice.cache_bytes]
    left: dict[Region, list[str]] = {}
    for choice in caching:
        for region in choice.regions:
            if region.status != "cached":
                left.setdefault(region, []).append(choice.recipe)
    if left:
        yield ""
        yield "runs at every step:"
    for region, recipes in left.items():
        place = f" ({found.places[region.name]})" if region.name in found.places else ""
        where = "" if len(recipes) == len(caching) else f" [{', '.join(recipes)}]"
        yield f"  {_NOUNS.get(region.kind, region.kind)} {region.name}{place}: {region.reason or 'no reason'}{where}"
