"""The kinds of code that DiT-MoE models are made of, each in a model that is plain otherwise.

`python -m bench.code_shapes` writes what is captured of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from tests.capture import running_layers as layers
from tests.capture.layers import WIDTH
from tests.variants.attention import Attending
from tests.variants.blocks import Blocking, Model, Modelling, make_model
from tests.variants.dispatch import DISPATCHES, WITH_EXTRAS, Layering
from tests.variants.experts import BODIES
from tests.variants.pairs import PAIRED
from tests.variants.routing import Routing
from tests.variants.statements import STATEMENTS, Statement

BLOCK = Blocking(Attending(heads=2, kv_heads=2), Layering("mask_hit"))
PLAIN = Modelling((BLOCK,), width=WIDTH, side=4)


@dataclass(frozen=True)
class Shape:
    """One kind: what it is, in words or code, in the group of its like; how the model around it is; the model."""

    group: str
    what: str
    how: Modelling
    make: Callable[[], Model]


def shapes() -> Iterator[Shape]:
    for name, kind in (DISPATCHES | PAIRED).items():
        extra = "time" if name in WITH_EXTRAS else None
        group = "Each expert chooses its tokens" if name in PAIRED else "Each token chooses its experts"
        yield _modelled(group, _first_sentence(kind), _with(Layering(name, extra=extra)))
    for layer in OTHER_LAYERS:
        yield Shape("Layers of other code", _first_sentence(layer), PLAIN, lambda layer=layer: _with_layer(layer()))
    for name, statement in STATEMENTS.items():
        yield _modelled("Statements beside a dispatch", _code(statement), _with(Layering("mask_hit", beside=(name,))))
    for what, routing in ROUTERS.items():
        yield _modelled("Routers", what, _with(Layering("mask_hit", routing)))
    for what, reads in READS.items():
        yield _modelled("Routers", what, _with(Layering("mask_hit", reads=reads)))
    for name in BODIES:
        yield _modelled("Experts", EXPERTS[name], _with(Layering("mask_hit", body=name)))
    for what, attending in ATTENTIONS.items():
        yield _modelled("Attention", what, replace(PLAIN, width=16, blocks=(replace(BLOCK, attending=attending),)))
    for what, how in MODELS.items():
        yield _modelled("The model around the layers", what, how)


OTHER_LAYERS: tuple[type[nn.Module], ...] = (
    *(layers.KeepsTheRouting, layers.CountsUse, layers.LogsAndChecks, layers.Casts, layers.Closure),
    *(layers.ThroughNumpy, layers.Split, layers.TouchesIdleOnes, layers.Unweighted, layers.OntoTheRows),
    *(layers.OfADict, layers.DenseTwice, layers.PartOfAList, layers.Threshold, layers.Packed, layers.Viewed),
)
"""Layers that only running finds."""

ROUTERS = {
    "softmax, top-k of the probabilities": Routing(choice="raw"),
    "softmax, top-k that sum to 1": Routing(choice="renormalized"),
    "sigmoid, top-k that sum to 1, scaled": Routing(scores="sigmoid", choice="scaled"),
    "sigmoid, chosen with a learned bias (balanced without a loss)": Routing(scores="sigmoid", choice="bias"),
    "the best experts of the best groups": Routing(8, choice="groups"),
    "in float32 whatever the model's dtype": Routing(wide=True),
    "one expert a token": Routing(top_k=1),
}

READS = {
    "reads the timestep embedding, too": "timed",
    "reads the tokens without their modulation": "unmodulated",
}

EXPERTS = {
    "swiglu": "SwiGLU",
    "mlp": "two linear layers and an activation",
    "linear": "one linear layer, squared ReLU",
    "normed": "a LayerNorm between two linear layers",
    "rms": "an RMS norm, spelled out, before a SwiGLU",
}

_HEADS = Attending(heads=2, kv_heads=2)
ATTENTIONS = {
    "one linear layer for queries, keys and values": _HEADS,
    "a linear layer for each": replace(_HEADS, fused=False),
    "queries and keys normalized by LayerNorm": replace(_HEADS, norm="layer"),
    "queries and keys normalized by RMS": replace(_HEADS, norm="rms"),
    "rotary embedding of halves": replace(_HEADS, rope="half"),
    "rotary embedding of pairs": replace(_HEADS, rope="interleaved"),
    "rotary embedding in complex numbers": replace(_HEADS, rope="complex"),
    "softmax spelled out": replace(_HEADS, kernel="softmax"),
    "fewer key heads, told to SDPA": replace(_HEADS, kv_heads=1, fused=False),
    "fewer key heads, repeated": replace(_HEADS, kv_heads=1, fused=False, spread="repeated"),
    "fewer key heads, expanded": replace(_HEADS, kv_heads=1, fused=False, spread="expanded"),
    "a bias of positions": replace(_HEADS, mask="additive"),
    "a mask of padded tokens": replace(_HEADS, mask="padding"),
}

_TEXT = replace(BLOCK, attending=replace(BLOCK.attending, text=True))
MODELS = {
    "adaLN with shift, scale and gate for each branch": PLAIN,
    "adaLN without shifts": replace(PLAIN, chunks=4),
    "adaLN without gates, one for both branches": replace(PLAIN, chunks=2),
    "no adaLN: the time is added to the stream": replace(PLAIN, chunks=0),
    "adaLN of two streams; attention reads the text's keys": replace(PLAIN, chunks=12, blocks=(_TEXT,)),
    "gates limited by tanh": replace(PLAIN, gate="tanh"),
    "gates limited by clamp": replace(PLAIN, gate="clamp"),
    "`branch + stream` in that order": replace(PLAIN, stream_first=False),
    "a text vector in place of a label": replace(PLAIN, label="text"),
    "no label": replace(PLAIN, label="none"),
    "integer timesteps": replace(PLAIN, timestep="long"),
    "one timestep for the batch": replace(PLAIN, timestep="scalar"),
    "a long skip that is added": replace(PLAIN, skip="add", blocks=(BLOCK,) * 2),
    "a long skip that is concatenated": replace(PLAIN, skip="cat", blocks=(BLOCK,) * 2),
    "a depthwise convolution beside attention": replace(PLAIN, blocks=(replace(BLOCK, convolution="residual"),)),
    "a depthwise convolution before the experts": replace(PLAIN, blocks=(replace(BLOCK, convolution="inside"),)),
    "shared experts": replace(PLAIN, blocks=(replace(BLOCK, feedforward=Layering("mask_hit", shared=(8, 20))),)),
    "dense blocks between those with experts": replace(PLAIN, blocks=(replace(BLOCK, feedforward="mlp"), BLOCK)),
    "bfloat16": replace(PLAIN, dtype=torch.bfloat16),
}


def _modelled(group: str, what: str, how: Modelling) -> Shape:
    return Shape(group, what, how, lambda: make_model(how))


def _with(layer: Layering) -> Modelling:
    return replace(PLAIN, blocks=(replace(BLOCK, feedforward=layer),))


def _with_layer(layer: nn.Module) -> Model:
    model = make_model(PLAIN)
    model.blocks[0].mlp = layer.eval().requires_grad_(False)
    return model


def _first_sentence(kind: type) -> str:
    assert kind.__doc__
    return kind.__doc__.split("\n")[0].partition(". ")[0].rstrip(".")


def _code(statement: Statement) -> str:
    """The statement in one line of code."""
    parts = (part.format(x="x") for part in statement if part)
    return "`" + " ... ".join("; ".join(" ".join(part.split("\n    ")).split("\n")) for part in parts) + "`"
