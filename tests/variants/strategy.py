"""Random small DiT-MoE models: compositions of everything in this folder that make sense together."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from tests.variants.attention import Attending
from tests.variants.blocks import Blocking, Modelling
from tests.variants.dispatch import BY_RUNNING, GROUPED, PACKED, WITH_EXTRAS, WITH_MODULES, Layering
from tests.variants.experts import BODIES
from tests.variants.pairs import PAIRED
from tests.variants.routing import Routing
from tests.variants.statements import STATEMENTS

ALL = ("attention", "experts", "shared")
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLANS = ((True,), (True,), (True,), (True, True), (True, True), (False, True), (True, False), (True, False, True))
"""Which blocks have experts."""

ONLY_READ = {"gathered_bmm", "gathered_einsum", "dense_packed", "mask_extra", "over_threshold"} | {
    name for name in PAIRED if name.startswith("predicted")
}
"""What idioms read and running does not find: a statement that idioms do not follow leaves such a layer as it is."""


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    choice = draw(st.sampled_from(["raw", "renormalized", "scaled", "bias", "groups"]))
    experts = 8 if choice == "groups" else draw(st.sampled_from([3, 4, 6]))
    top_k = draw(st.integers(1, min(4, experts)))
    return Routing(experts, top_k, draw(st.sampled_from(["softmax", "sigmoid"])), choice, draw(st.booleans()))


@st.composite
def statements(draw: st.DrawFn) -> tuple[str, ...]:
    return tuple(draw(st.lists(st.sampled_from(list(STATEMENTS)), max_size=3, unique=True)))


@st.composite
def layerings(draw: st.DrawFn, dtype: torch.dtype) -> Layering:
    kinds, routing = [*WITH_MODULES, *WITH_EXTRAS, *PACKED, *PAIRED, *BY_RUNNING], draw(routings())
    if routing.top_k == routing.experts:  # what the host reads is always the same: nothing is known of other ids
        kinds = [kind for kind in kinds if kind not in ("host_set", "put_back", "beside", "idle_ones")]
    if dtype not in (torch.float32, torch.bfloat16):  # there is no grouped product for them on a CPU
        kinds = [kind for kind in kinds if kind not in GROUPED]
    dispatch = draw(st.sampled_from(kinds))
    packed = dispatch in PACKED
    return Layering(
        dispatch,
        routing,
        "swiglu" if packed else draw(st.sampled_from(list(BODIES))),
        draw(st.sampled_from([8, 16, 24])),
        False if packed else draw(st.booleans()),
        tuple(draw(st.lists(st.sampled_from([8, 20]), max_size=2))),
        draw(st.sampled_from(["same", "same", "timed", "unmodulated", "both"])),
        draw(st.sampled_from(["time", "context"])) if dispatch in WITH_EXTRAS else None,
        draw(st.booleans()) and dispatch not in PAIRED,
        () if dispatch in ONLY_READ or routing.top_k == routing.experts else draw(statements()),
    )


@st.composite
def attendings(draw: st.DrawFn, text: bool) -> Attending:
    plain = draw(st.integers(0, 2)) > 0  # two of three are such as every model has
    heads = draw(st.sampled_from([2, 4]))
    kernel = "sdpa" if plain else draw(st.sampled_from(["sdpa", "softmax"]))
    return Attending(
        fused=draw(st.booleans()),
        norm=draw(st.sampled_from([None, "layer", "rms"])),
        rope=draw(st.sampled_from([None, "half", "interleaved"]))
        if plain
        else draw(st.sampled_from(["complex", None])),
        kernel=kernel,
        heads=heads,
        kv_heads=heads if draw(st.booleans()) else heads // 2,
        spread=draw(st.sampled_from(["told", "repeated", "expanded"])),
        mask=None if plain else draw(st.sampled_from([None, "additive", "padding"])),
        text=text and draw(st.booleans()),
    )


@st.composite
def blockings(draw: st.DrawFn, dtype: torch.dtype, text: bool, experts: bool) -> Blocking:
    dense = st.sampled_from(["mlp", "swiglu"])
    return Blocking(
        draw(attendings(text)),
        draw(layerings(dtype)) if experts else draw(dense),
        draw(st.sampled_from([None, None, None, None, "residual", "inside"])),
    )


@st.composite
def modellings(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Modelling:
    dtype = draw(st.sampled_from(dtypes))
    chunks = draw(st.sampled_from([6, 6, 4, 2, 12, 0]))
    experts = draw(st.sampled_from(PLANS))
    blocks = tuple(draw(blockings(dtype, chunks == 12, each)) for each in experts)
    heads = blocks[0].attending.heads
    width = draw(st.sampled_from([16, 24]))
    return Modelling(
        tuple(same_heads(block, heads) for block in blocks),
        width=width,
        side=draw(st.sampled_from([2, 3, 4])),
        batch=draw(st.integers(1, 3)),
        chunks=chunks,
        gate=draw(st.sampled_from(["plain", "tanh", "clamp"])),
        stream_first=draw(st.booleans()),
        label=draw(st.sampled_from(["class", "text", "none"])),
        timestep=draw(st.sampled_from(["float", "long", "scalar"])),
        skip=draw(st.sampled_from([None, None, "add", "cat"])),
        dtype=dtype,
        seed=draw(st.integers(0, 3)),
    )


def same_heads(block: Blocking, heads: int) -> Blocking:
    """The rotary table is one for all blocks, so heads are too."""
    from dataclasses import replace

    how = block.attending
    kv_heads = heads if how.kv_heads == how.heads else heads // 2
    return replace(block, attending=replace(how, heads=heads, kv_heads=kv_heads))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of the recipe moeca that the simulation knows."""
    chosen: dict[str, Any] = {"full_every": draw(st.sampled_from([2, 3, 4]))}
    if draw(st.booleans()):
        chosen["budget"] = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    else:  # a budget takes the place of the threshold, and with 0 nothing is ranked
        chosen["tau0"] = draw(st.sampled_from([0.0, 0.6, 0.8, 1.0]))
        chosen["entropy"] = draw(st.sampled_from(["log", "minmax"]))
        chosen["statistic"] = draw(st.sampled_from(["sample", "batch"]))
    if chosen.get("budget") != 0:
        chosen["score"] = draw(st.sampled_from(["paper", "drift", "staleness"]))
        chosen["score_weights"] = draw(st.sampled_from(["normalized", "raw"]))
    some = chosen.get("budget") != 0  # else no token is chosen
    for name, values in {
        "keys_values": ["all", "chosen", "none"] if some else ["all", "chosen"],
        "mask_source": ["probe", "previous"] if some else ["probe"],
        "shared": ["any", "always", "never"] if some else ["always", "never"],
        "overwrite": [True, False],
        "forecast": [(), (), ("attention",), ("experts",), ALL],
    }.items():
        chosen[name] = draw(st.sampled_from(values))
    return chosen
