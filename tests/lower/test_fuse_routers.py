"""A router's choice as one op: what is read of it, that it means the same, and what is left as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.families.dsmoe import DSMoESizes, GroupedSigmoidRouter
from moeca_compile.lower import fuse_routers as fuse
from moeca_compile.lower import fuse_selections
from tests.harness import exported
from tests.lower import rewrites
from tests.lower.rewrites import traced
from tests.runtime.fake_cuda import CUDA
from tests.variants.routing import Router, Routing

aten = torch.ops.aten
CHOOSE = torch.ops.moeca.choose_experts.default
T, E = 64, 16
rewritten = partial(rewrites.rewritten, fuse.fuse_routers)


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    """As on CUDA with Triton: what is traced for a CPU here is run there, too."""
    monkeypatch.setattr(fuse.kernels, "available", lambda: True)
    monkeypatch.setattr(fuse_selections, "_on_cuda_float", lambda node: node.meta["val"].is_floating_point())


def dsmoe(groups: int) -> Callable[..., Any]:
    """DSMoE's router, whose product gives the rows themselves."""
    own = GroupedSigmoidRouter(DSMoESizes(width=E, depth=1, heads=1, experts=E, groups=groups))

    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        parameters = {"weight": torch.eye(E, device=bias.device), "bias": bias}
        return torch.func.functional_call(own, parameters, logits)  # type: ignore[return-value]

    return run


def variant(**routing: Any) -> Callable[..., Any]:
    """The same of a router of tests/variants."""
    own = Router(Routing(experts=E, top_k=3, **routing), E)

    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        parameters = {"weight": torch.eye(E, device=bias.device, dtype=bias.dtype), "correction": bias}
        return torch.func.functional_call(own, parameters, logits)  # type: ignore[return-value]

    return run


def deepseek_v3(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As in transformers' DeepseekV3TopkRouter, eqs. 13 to 16 of its paper."""
    scores = logits.sigmoid()
    choosing = scores.view(-1, E) + bias.unsqueeze(0)
    group_scores = choosing.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)
    group_idx = torch.topk(group_scores, k=2, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    choosing = choosing.masked_fill(~score_mask.bool(), 0.0)
    ids = torch.topk(choosing, k=3, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return ids, weights * 2.5


def where_inside(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The mask read the other way round, -inf elsewhere, and weights that have the bias."""
    scores = logits.float().softmax(-1) + bias
    by_group = scores.reshape(-1, 2, E // 2)
    best = by_group.max(-1).values.topk(1).indices
    inside = torch.zeros(best.shape[0], 2, device=logits.device).scatter(1, best, 1).gt(0)
    allowed = torch.where(inside[..., None], by_group, -math.inf).reshape(scores.shape)
    weights, ids = allowed.topk(2)
    return ids, weights.softmax(-1).to(logits.dtype)


def raw_logits(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The choice goes by biased logits, and the softmax is that of the chosen ones, of samples by tokens."""
    logits = logits.view(4, -1, E)
    ids = (logits + bias).topk(4).indices
    return ids, logits.gather(-1, ids).softmax(-1)


def cast_first(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The weights are cast before they are normalized, so the op ends with the cast."""
    scores = logits.softmax(-1, dtype=torch.float32)
    ids = (scores + bias).topk(2)[1]
    weights = scores.gather(-1, ids).to(torch.bfloat16)
    return ids, weights / weights.sum(-1, keepdim=True)


def read_twice(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The gathered scores have another reader, so the op ends before the normalization. The scores have one, too."""
    scores = logits.sigmoid()
    ids = (scores + bias).topk(2)[1]
    weights = scores.gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True), weights.square(), scores.mean(0)


def ids_alone(logits: Tensor, bias: Tensor) -> Tensor:
    """In groups; the weights are a matter of others."""
    grid = (logits + bias).unflatten(-1, (4, -1))
    best = grid.amax(-1).topk(2).indices
    outside = torch.zeros(T, 4, dtype=torch.bool, device=bias.device).scatter(1, best, True).logical_not()
    return grid.masked_fill(outside.unsqueeze(2), -1e4).view(T, E).topk(2).indices


ROUTERS: dict[str, Callable[..., Any]] = {
    "DSMoE": dsmoe(2),
    "DSMoE without groups": dsmoe(1),
    "variant with a bias": variant(choice="bias"),
    "variant with a bias, sigmoid": variant(choice="bias", scores="sigmoid"),
    "variant with groups": variant(choice="groups"),
    "variant with groups, wide": variant(choice="groups", wide=True),
    "DeepSeek-V3": deepseek_v3,
    "where": where_inside,
    "raw logits": raw_logits,
    "cast first": cast_first,
    "read twice": read_twice,
    "ids alone": ids_alone,
}
LEFT = {"cast first": {aten.sum.dim_IntList}, "read twice": {aten.sum.dim_IntList, aten.sigmoid.default}}
"""What stays of the ops around a top-k."""

UNSORTED = {"DSMoE", "DSMoE without groups", "variant with groups", "variant with groups, wide", "DeepSeek-V3"}
"""They leave the order of a token's experts open."""


def by_id(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.gather(-1, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_becomes_one_op_and_gives_the_same(name, dtype):
    function = ROUTERS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in ((T, E), (E,))]
    gm = exported(function, *inputs)
    assert rewritten(gm) == 1
    targets = {node.target for node in gm.graph.nodes}
    around = {aten.topk.default, aten.gather.default, aten.scatter.value, aten.sigmoid.default, aten.sum.dim_IntList}
    assert targets & around == LEFT.get(name, set()) and CHOOSE in targets
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    found, expected = gm(*inputs), function(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    if name in UNSORTED:
        found, expected = by_id(*found), by_id(*expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


def test_shapes_and_devices_on_cuda():
    gm = traced(dsmoe(2), (T, E), (E,))
    assert rewritten(gm) == 1
    (op,) = gm.graph.find_nodes(op="call_function", target=CHOOSE)
    assert [(tuple(v.shape), v.dtype, v.device) for v in op.meta["val"]] == [
        ((T, 2), torch.int64, CUDA),
        ((T, 2), torch.float32, CUDA),
    ]
    assert op.args[2:] == (2, "sigmoid", 2, 1, 2, 0.0, True, "sum", 1e-20, 2.0, torch.float32, torch.float32)


def test_without_kernels_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(fuse.kernels, "available", lambda: False)
    gm = traced(dsmoe(2), (T, E), (E,))
    assert rewritten(gm) == 0 and gm.graph.find_nodes(op="call_function", target=aten.topk.default)


# --- near misses ----------------------------------------------------------------------------------------------


def grouped(
    scores: Tensor,
    *,
    order: Callable[[Tensor], Tensor] = lambda grid: grid,
    best: Callable[[Tensor], Tensor] = lambda grid: grid.amax(-1).topk(2).indices,
    mark: Callable[[Tensor, Tensor], Tensor] = lambda zeros, best: zeros.scatter(1, best, 1),
    mask: Callable[[Tensor], Tensor] = lambda marks: (marks == 0)[..., None],
) -> Tensor:
    """The best of the best groups' experts, with a fault in one place."""
    grid = order(scores.view(T, 4, 4))
    marks = mark(torch.zeros(T, 4, device=scores.device), best(grid))
    return grid.masked_fill(mask(marks), 0.0).reshape(T, E).topk(2).indices


NEAR_MISSES: dict[str, Callable[[Tensor], Any]] = {
    "groups across": lambda x: grouped(x, order=lambda grid: grid.transpose(1, 2)),
    "goodness of other values": lambda x: grouped(x, best=lambda grid: (-grid).amax(-1).topk(2).indices),
    "the sum of three": lambda x: grouped(x, best=lambda grid: grid.topk(3).values.sum(-1).topk(2).indices),
    "the mean": lambda x: grouped(x, best=lambda grid: grid.mean(-1).topk(2).indices),
    "goodness of columns": lambda x: grouped(x, best=lambda grid: grid.amax(1).topk(2).indices),
    "marks of two": lambda x: grouped(x, mark=lambda zeros, best: (zeros + 1).scatter(1, best, 1)),
    "another mark": lambda x: grouped(x, mark=lambda zeros, best: zeros.scatter(1, best, 0.5)),
    "marks in the other dim": lambda x: grouped(x, mark=lambda zeros, best: zeros.scatter(0, best, 1)),
    "marks that are more than 1": lambda x: grouped(x, mask=lambda marks: (marks == 1)[..., None]),
    "the groups that are kept": lambda x: grouped(x, mask=lambda marks: marks.bool()[..., None]),
    "one mark a column": lambda x: grouped(x, mask=lambda marks: (marks == 0)[:, None, :]),
    "another comparison": lambda x: grouped(x, mask=lambda marks: (marks < 1)[..., None]),
    "softmax and top-k, one kernel of Inductor's": lambda x: x.softmax(-1).topk(2),
    "top-k alone": lambda x: x.topk(2),
    "gathered from others": lambda x: (ids := x.sigmoid().topk(2).indices, x.gather(-1, ids)),
    "gathered across": lambda x: (ids := x.sigmoid().topk(2).indices, x.sigmoid().gather(0, ids)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_stays_as_it_is(name):
    gm = traced(NEAR_MISSES[name], (T, E), device=torch.device("cpu"))
    before = [node.target for node in gm.graph.nodes]
    assert rewritten(gm) == 0
    assert [node.target for node in gm.graph.nodes] == before


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "over tokens": lambda w: w / w.sum(0, keepdim=True),
    "by another": lambda w: w / w.square().sum(-1, keepdim=True),
    "the other way": lambda w: w.sum(-1, keepdim=True) / w,
    "with a bound": lambda w: w / w.sum(-1, keepdim=True).clamp_min(1e-9),
    "with a tensor": lambda w: w / (w.sum(-1, keepdim=True) + w[:, :1]),
    "a softmax over tokens": lambda w: w.softmax(0),
    "times itself": lambda w: w * w,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed_otherwise_stay(name):
    def router(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ids = (scores + bias).topk(2).indices
        return ids, WEIGHTS[name](scores.gather(-1, ids))

    gm = traced(router, (T, E), (E,), device=torch.device("cpu"))
    assert rewritten(gm) == 1
    (op,) = gm.graph.find_nodes(op="call_function", target=CHOOSE)
    assert op.args[9:12] == ("none", 0.0, 1.0)
    logits, bias = torch.randn(T, E), torch.randn(E)
    for found, expected in zip(gm(logits, bias), router(logits, bias), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
