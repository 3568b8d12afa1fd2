"""Bodies planned and run for all experts at once by ATen ops, against each expert on its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_compile._torch_private import trace_to_graph
from moeca_compile.ops import bodies, body_run
from moeca_compile.ops.body_plan import GroupedProduct, RowOp, flops_per_row, plan_for
from moeca_compile.ops.body_run import run_by_expert
from moeca_compile.ops.unsupported import UnsupportedError

WIDTH, HIDDEN, EXPERTS = 6, 10, 4
OFFSETS = torch.tensor([0, 3, 3, 4, 9])
"""Where the rows of each expert begin; the second has none."""


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def matrices(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    return torch.addmm(bias, x, up).relu() @ down


def two_rows_a_token(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, 2, WIDTH // 2), weight).flatten(1)


def normed(x: Tensor, up: Tensor, scale: Tensor, shift: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.linear(x, up), (HIDDEN,), scale, shift).relu(), down)


def computed_weight(x: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    return F.linear(x, direction / direction.norm(dim=1, keepdim=True) * length)


def bilinear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("rd,dek,re->rk", x, weight, x)


H, D = HIDDEN, WIDTH
BODIES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], list[str]]] = {
    "swiglu": (swiglu, [(H, D), (H, D), (D, H)], ["product", "silu", "product", "mul", "product"]),
    "matrices": (matrices, [(D, H), (H,), (H, D)], ["product", "relu", "product"]),
    "two rows a token": (two_rows_a_token, [(D // 2, D // 2)], ["reshape", "product", "flatten"]),
    "normed": (normed, [(H, D), (H,), (H,), (D, H)], ["product", "layer_norm by expert", "relu", "product"]),
    "computed weight": (computed_weight, [(D, D), (D, 1)], ["product"]),
    "bilinear": (bilinear, [(D, D, D)], ["einsum by expert"]),
}


def key_of(function: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]]) -> str:
    graph = trace_to_graph(function, torch.zeros(3, WIDTH), *(torch.zeros(shape) for shape in shapes)).graph
    for node in graph.nodes:  # as passes.match.experts does: an expert has any number of rows
        if "view" in str(node.target) or "reshape" in str(node.target):
            node.target = torch.ops.aten.reshape.default
            node.args = (node.args[0], [-1, *node.args[1][1:]])
    return bodies.register(fx.GraphModule({}, graph))


def make(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    return torch.randn(int(OFFSETS[-1]), WIDTH), [torch.randn(shape) for _ in range(EXPERTS) for shape in shapes]


def step_names(body: str, rows: Tensor, parameters: Sequence[Tensor]) -> list[str]:
    def name(step: GroupedProduct | RowOp) -> str:
        if isinstance(step, GroupedProduct):
            return "product"
        return step.node.target.__name__.split(".")[0] + " by expert" * step.reads_parameters

    return [name(step) for step in plan_for(body, [rows], parameters).steps]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_on_the_rows_of_all_experts_equals_each_expert_on_its_own(name):
    function, shapes, steps = BODIES[name]
    rows, parameters = make(shapes)
    body, each = key_of(function, shapes), len(shapes)
    assert step_names(body, rows, parameters[:each]) == steps
    found = outputs(body, [rows], OFFSETS, parameters)
    assert_each_expert_on_its_own_rows(found, function, rows, OFFSETS, parameters)


def outputs(body: str, rows: list[Tensor], offsets: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Of all rows, which are sorted by expert."""
    return torch.cat([found for _, found in run_by_expert(body, rows, offsets, parameters, EXPERTS)])


def assert_each_expert_on_its_own_rows(
    found: Tensor, function: Callable[..., Tensor], rows: Tensor, offsets: Tensor, parameters: Sequence[Tensor]
) -> None:
    each = len(parameters) // EXPERTS
    for e in range(EXPERTS):
        own = slice(int(offsets[e]), int(offsets[e + 1]))
        expected = function(rows[own], *parameters[e * each : (e + 1) * each])
        torch.testing.assert_close(found[own], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("offsets", [[0, 300, 600, 600, 1000], [0, 0, 700, 701, 1300], [0, 512, 1024, 1024, 1024]])
def test_experts_with_many_rows_run_in_parts_of_few_rows(name, offsets, monkeypatch):
    function, shapes, _ = BODIES[name]
    most, run = [], body_run.run_steps

    def spy(plan: Any, values: dict[Any, Tensor], provider: Any) -> Tensor:
        most.append(len(next(iter(values.values()))))
        return run(plan, values, provider)

    monkeypatch.setattr(body_run, "run_steps", spy)
    parameters, rows = make(shapes)[1], torch.randn(offsets[-1], WIDTH)
    found = outputs(key_of(function, shapes), [rows], torch.tensor(offsets), parameters)
    assert_each_expert_on_its_own_rows(found, function, rows, torch.tensor(offsets), parameters)
    assert len(most) == 2 and sum(most) == offsets[-1]


@pytest.mark.parametrize("name", BODIES)
def test_each_part_gathers_the_rows_of_its_branches(name):
    function, shapes, _ = BODIES[name]
    offsets, parameters, rows = torch.tensor([0, 300, 600, 600, 1000]), make(shapes)[1], torch.randn(50, WIDTH)
    source = torch.randint(50, (1000,))
    parts = dict(
        ((part.start, part.stop), found)
        for part, found in run_by_expert(key_of(function, shapes), [rows], offsets, parameters, EXPERTS, source)
    )
    assert [*parts] == [(0, 600), (600, 1000)]
    found = torch.cat([*parts.values()])
    assert_each_expert_on_its_own_rows(found, function, rows[source], offsets, parameters)


@pytest.mark.parametrize("name", BODIES)
def test_no_rows_at_all_give_no_outputs(name):
    function, shapes, _ = BODIES[name]
    rows, parameters = make(shapes)
    found = outputs(key_of(function, shapes), [rows[:0]], OFFSETS * 0, parameters)
    assert found.shape == (0, WIDTH)


def test_a_body_that_cannot_be_planned_runs_expert_by_expert():
    body = bodies.register(fx.symbolic_trace(lambda x, w: (x @ w).relu()))  # relu is a method here, and no op
    rows, parameters = make([(D, D)])
    with pytest.raises(UnsupportedError, match="call_method relu"):
        plan_for(body, [rows], parameters[:1])
    found = outputs(body, [rows], OFFSETS, parameters)
    for e in range(EXPERTS):
        own = slice(int(OFFSETS[e]), int(OFFSETS[e + 1]))
        torch.testing.assert_close(found[own], (rows[own] @ parameters[e]).relu())


def test_rows_that_are_mixed_are_not_planned():
    body = key_of(lambda x, w: F.linear(x - x.mean(0), w), [(D, D)])
    rows, parameters = make([(D, D)])
    with pytest.raises(UnsupportedError, match="no row for each row"):
        plan_for(body, [rows], parameters[:1])


class Names(TorchDispatchMode):
    """Notes the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_that_is_no_cpu_products_are_pytorchs_own(dtype):
    """oneDNN knows the CPU only: on CUDA it raises NotImplementedError. Tensors without data stand for a device."""
    function, shapes, _ = BODIES["swiglu"]
    rows, parameters = (
        [value.to("meta", dtype) for value in values] for values in (make(shapes)[:1], make(shapes)[1])
    )
    body = key_of(function, shapes)
    with Names() as ops:
        assert outputs(body, rows, OFFSETS, parameters).shape == (9, WIDTH)
    assert any("aten.linear" in op or "aten.mm" in op for op in ops.found)
    assert not any("mkldnn" in op for op in ops.found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("swiglu", 6 * D * H), ("matrices", 4 * D * H), ("two rows a token", D * D), ("normed", 4 * D * H)],
)
def test_flops_of_a_row(name, expected):
    function, shapes, _ = BODIES[name]
    rows, parameters = make(shapes)
    assert flops_per_row(key_of(function, shapes), [rows], parameters[: len(shapes)]) == expected
