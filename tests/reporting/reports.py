"""A report with a trace, made up: all that a page can show."""

from __future__ import annotations

import dataclasses

from moeca_compile.config import MoecaConfig
from moeca_compile.reporting import Flops, GraphBreak, Region, Report
from moeca_compile.reporting.trace import KindCost, Trace, TracedStep

HOSTILE = "</title></svg><script>alert(1)</script>\"'&amp;{{ 7 * 7 }}"
"""What a name in a user's code must never become."""


def traced_step(number: int, layers: int) -> TracedStep:
    """A generation of full steps every 3, in which the token at place `number` is always recomputed."""
    full = number % 3 == 0
    drift = () if not full or number == 0 else (0.1 * number, None, *[0.25] * (layers - 1))
    if full:
        routing = tuple((4, 8, 12, 8) for _ in range(layers))
        return TracedStep(number, 1 - number / 10, {"full": 2}, 0.02, routing=routing, drift=drift)
    return TracedStep(
        number,
        1 - number / 10,
        {"cache[4]": 2},
        0.005,
        match=(0.9,) * layers,
        reuse=(0.75,) * layers,
        recomputed=(2.0,) * layers,
        tokens=tuple(1.0 if place == number else 0.0 for place in range(16)),
        routing=((8, 8, 8, 8), *[()] * (layers - 1)),
    )


def make_report(name: str = "blocks", steps: int = 8, layers: int = 2, **changes) -> Report:
    """A report whose modules have names that begin with `name`."""
    names = tuple(f"{name}.{i}.mlp" for i in range(layers))
    trace = Trace(
        samples=2,
        tokens=16,
        grid=(4, 4),
        layers=names,
        regions=(f"attention {name}.0.attn", *(f"experts {each}" for each in names)),
        steps=tuple(traced_step(number, layers) for number in range(steps)),
        kinds=(KindCost("full", 3, 0.02, 4e9), KindCost("cache[4]", 5, 0.005, 5e8)),
        mapped_layer=names[layers // 2],
        activation=tuple(tuple(place * (expert + 1) % 16 for place in range(16)) for expert in range(4)),
    )
    known = {
        "graphs": 1,
        "graph_breaks": (GraphBreak(f"{name}.py:12", f"{name} is not traced"),),
        "regions": (
            Region("attention", f"{name}.0.attn", "cached", f"a remark on {name}"),
            Region("experts", f"{name}.0.mlp", "skipped", f"because of {name}"),
        ),
        "places": {f"{name}.0.attn": f"{name}.py:30"},
        "cache_bytes": 2**20,
        "planned_cache_bytes": 2**20,
        "memory": {"weights": 2**22, "attention": 2**19, "experts, routing": 2**10},
        "compiled_parts": 6,
        "parts_beside": 5,
        "early_runs": {"full": 2, "cache": 9},
        "peak_bytes": 2**24,
        "peak_measured": "by hand",
        "compile_seconds": {"capture": 0.5, "lower": 12.0},
        "steps": {"full": 6, "cache[4]": 10},
        "match_ratio": 0.9,
        "reuse_ratio": 0.75,
        "flops": Flops(4e9, 2e9),
        "validation_errors": {"full": 1e-7},
        "warnings": (f"{name} is unusual",),
        "device": "cpu",
        "dtype": "torch.float32",
        "config": dataclasses.asdict(MoecaConfig(recipe="moeca")),
        "traces": (trace,),
    }
    return Report(**{**known, **changes})
