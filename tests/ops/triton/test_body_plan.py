"""Which ops of a body become kernels, and what cannot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.ops.triton.cases import BODIES, HIDDEN, WIDTH, Body, graph_of

kernels = pytest.importorskip("moeca_compile.ops.triton.body_plan")
from moeca_compile.ops.body_plan import BodyPlan, GroupedProduct  # noqa: E402
from moeca_compile.ops.unsupported import UnsupportedError  # noqa: E402

H, D = HIDDEN, WIDTH


def planned(graph: fx.GraphModule, rows: list[Tensor], parameters: list[Tensor]) -> BodyPlan:
    return kernels.KernelPlanner.of(graph, rows, parameters).plan()


def plan_of(body: Body, dtype: torch.dtype = torch.float32) -> BodyPlan:
    rows = [torch.zeros(5, WIDTH, dtype=dtype)] * body.rows
    return planned(body.graph(dtype), rows, [torch.zeros(shape, dtype=dtype) for shape in body.shapes])


def kinds(plan: BodyPlan) -> list[str]:
    """Each step in a word: the activation and number of parts of a product, the name of any other op."""
    return [
        f"{step.activation} x{len(step.slices)}" if isinstance(step, GroupedProduct) else step.node.target.__name__
        for step in plan.steps
    ]


def products_only(plan: BodyPlan) -> bool:
    """Whether nothing runs but kernels of ours."""
    return all(isinstance(step, GroupedProduct) for step in plan.steps)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swiglu", ["silu x2", "none x1"]),
        ("swiglu with biases", ["silu x2", "none x1"]),
        ("gelu", ["gelu_tanh x1", "none x1"]),
        ("exact gelu", ["gelu x1", "none x1"]),
        ("relu", ["relu x1", "none x1"]),
        ("silu", ["silu x1", "none x1"]),
        ("packed", ["silu x2", "none x1"]),
        ("packed, up first", ["gelu x2", "none x1"]),
        ("packed, by views", ["silu x2", "none x1"]),
        ("one linear", ["relu x1", "square.default"]),
        ("layer norm", ["none x1", "layer_norm.default", "gelu.default", "none x1"]),
        ("scaled", ["mul.Tensor"]),
        ("one of two", ["none x1", "split.Tensor", "getitem"]),
    ],
)
def test_what_runs_in_which_kernel(name, expected):
    plan = plan_of(BODIES[name])
    assert kinds(plan) == expected
    assert products_only(plan) == BODIES[name].products_only


def test_slices_that_nothing_joins_are_views_of_one_product():
    plan = plan_of(BODIES["modulated"])
    products = [step for step in plan.steps if isinstance(step, GroupedProduct)]
    assert [(len(step.slices), step.slices[0].stop - step.slices[0].start) for step in products] == [
        (1, 3 * D),
        (2, H),
        (1, D),
    ]


def test_halves_of_one_weight_are_distinguished():
    for name, start in (("packed", 0), ("packed, up first", HIDDEN)):
        gated = plan_of(BODIES[name]).steps[0]
        assert [(part.start, part.stop) for part in gated.slices] == [(start, start + H), (H - start, 2 * H - start)]


def test_unequal_parts_of_a_weight_and_a_split_are_understood():
    def body(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
        gate, up, _ = torch.split(x @ both, [4, 4, 2], dim=-1)
        return (F.silu(gate) * up) @ down

    plan = plan_of(Body(body, ((D, 10), (4, D)), True))
    assert kinds(plan) == ["silu x2", "none x1"]
    assert [(part.start, part.stop) for part in plan.steps[0].slices] == [(0, 4), (4, 8)]


def near_misses() -> list[tuple[str, Body, list[str]]]:
    """Bodies that look like a gated product and are none: the parts differ in rows, in bias or in what follows."""

    def other_rows(x: Tensor, y: Tensor, g: Tensor, u: Tensor) -> Tensor:
        return F.silu(F.linear(x, g)) * F.linear(y, u)

    def one_bias(x: Tensor, g: Tensor, b: Tensor, u: Tensor) -> Tensor:
        return F.silu(F.linear(x, g, b)) * F.linear(x, u)

    def both_activated(x: Tensor, g: Tensor, u: Tensor) -> Tensor:
        return F.silu(F.linear(x, g)) * torch.relu(F.linear(x, u))

    def stored_otherwise(x: Tensor, g: Tensor, u: Tensor) -> Tensor:
        return F.silu(F.linear(x, g)) * (x @ u)

    return [
        ("other rows", Body(other_rows, ((D, D), (D, D)), False, rows=2), ["silu x1", "none x1", "mul.Tensor"]),
        ("one bias", Body(one_bias, ((D, D), (D,), (D, D)), False), ["silu x1", "none x1", "mul.Tensor"]),
        ("both activated", Body(both_activated, ((D, D), (D, D)), False), ["silu x1", "relu x1", "mul.Tensor"]),
        ("other storage", Body(stored_otherwise, ((D, D), (D, D)), False), ["silu x1", "none x1", "mul.Tensor"]),
    ]


@pytest.mark.parametrize(("body", "expected"), [pytest.param(*case[1:], id=case[0]) for case in near_misses()])
def test_near_misses_are_not_gated(body, expected):
    assert kinds(plan_of(body)) == expected


def test_a_value_that_is_used_twice_is_there_for_both():
    def body(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = F.linear(x, up)
        return F.linear(F.silu(h) + h, down)

    assert kinds(plan_of(Body(body, ((H, D), (D, H)), False))) == ["silu x1", "none x1", "add.Tensor", "none x1"]


def reject(function, shapes, text, dtype=torch.float32, rows=1) -> None:
    with pytest.raises(UnsupportedError, match=text):
        plan_of(Body(function, shapes, False, rows), dtype)


def test_products_in_float64_are_refused():
    reject(lambda x, w: F.linear(x, w), ((D, D),), "operands in float64", torch.float64)


def test_a_product_of_mixed_dtypes_is_refused():
    def body(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w).to(torch.float64) @ w.double()

    reject(body, ((D, D),), "operands in float64")


def test_rows_that_are_mixed_are_refused():
    reject(lambda x, w: F.linear(x - x.mean(0), w), ((D, D),), "no row for each row")
    reject(lambda x, w: F.linear(x.t(), w), ((D, 3),), "shapes|no row for each row")


def test_a_parameter_that_meets_rows_otherwise_than_value_by_value_is_refused():
    reject(lambda x, w: torch.bilinear(x, x, w, None), ((D, D, D),), "reads a parameter of the expert")
    reject(lambda x, w: F.linear(x.unsqueeze(-1) * w, w[:1, :]).squeeze(-1), ((D, D),), "several rows")


def test_several_rows_for_a_token_are_refused():
    reject(lambda x, w: F.linear(x.reshape(-1, 2, D // 2), w).flatten(1), ((D // 2, D // 2),), "several rows")


def test_shapes_that_depend_on_data_are_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.nonzero.default, (x,)))
    with pytest.raises(UnsupportedError, match=r"shapes|depends on data"):
        planned(fx.GraphModule({}, graph), [torch.zeros(3, D)], [])


def test_what_is_no_aten_op_is_refused():
    with pytest.raises(UnsupportedError, match="call_method"):
        planned(fx.symbolic_trace(lambda x, w: (x * w).relu()), [torch.zeros(3, D)], [torch.zeros(D)])


def test_a_plan_needs_shapes_only():
    """So that it can be asked of fake tensors, before anything runs."""
    body = BODIES["swiglu"]
    rows = [torch.empty(5, WIDTH, device="meta")]
    parameters = [torch.empty(shape, device="meta") for shape in body.shapes]
    graph = graph_of(body.function, body.shapes, WIDTH, torch.float32)
    assert products_only(planned(graph, rows, parameters))
