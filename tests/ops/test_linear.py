"""Linear layers on CPU, one and by group, against float64 products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import moeca_compile.ops.linear as ops_linear
from moeca_compile.lower.program import trace_step
from moeca_compile.ops import bodies
from moeca_compile.ops.body_run import run_by_expert
from moeca_compile.ops.cpu import library
from moeca_compile.ops.linear import grouped_linear, linear
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.step_function import StepResult
from tests.harness import lower_alone

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}
DTYPES = tuple(EPS)


def assert_close(found: Tensor, operands: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Within a rounding of the result's dtype, and of the float32 sum of its terms' sizes."""
    wide = [None if value is None else value.double() for value in operands]
    sizes = [None if value is None else value.abs() for value in wide]
    expected, size = F.linear(*wide), F.linear(*sizes)
    allowed = EPS[found.dtype] * expected.abs() + 4 * EPS[torch.float32] * size + 1e-30
    assert found.dtype == operands[0].dtype
    assert ((found.double() - expected).abs() <= allowed).all()


def layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
    return torch.randn(outputs, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (4, 1, 8), (63, 50), (64, 33), (65, 17), (2, 100, 16), (257, 16), (0, 8)])
def test_one_layer(shape, bias, dtype):
    torch.manual_seed(sum(shape))
    weight, b = layer(shape[-1], 21, dtype, bias)
    x = torch.randn(shape).to(dtype)
    found = torch.ops.moeca.linear(x, weight, b)
    assert found.is_contiguous()
    assert_close(found, (x, weight, b))


@pytest.mark.parametrize(("rows", "by_onednn"), [(200, True), (256, True), (257, False), (2560, False)])
def test_products_of_many_rows_are_pytorchs_own(rows, by_onednn, monkeypatch):
    """oneDNN's took a tenth longer in whole generations, because of page faults."""
    asked = []
    monkeypatch.setattr(ops_linear, "onednn_linear", lambda *operands: asked.append(1) or F.linear(*operands))
    x, (weight, bias) = torch.randn(rows, 16), layer(16, 21, torch.float32, True)
    assert_close(linear(x, weight, bias), (x, weight, bias))
    assert bool(asked) is by_onednn


def test_rows_that_are_not_contiguous():
    x, (weight, bias) = torch.randn(8, 5).t(), layer(8, 6, torch.float32, True)
    assert_close(linear(x, weight, bias), (x, weight, bias))
    strided = torch.randn(8, 6).t()
    assert_close(linear(x, strided, None), (x, strided, None))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_groups(sizes, inputs, outputs, dtype, bias, threads):
    """Any sizes of groups, empty ones too; odd numbers of inputs and outputs."""
    torch.manual_seed(sum(sizes) + inputs)
    layers = [layer(inputs, outputs, dtype, bias) for _ in sizes]
    weights, biases = [w for w, _ in layers], [b for _, b in layers] if bias else None
    rows, offsets = torch.randn(sum(sizes), inputs).to(dtype), torch.tensor([0, *sizes]).cumsum(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = grouped_linear(rows, offsets, weights, biases)
    finally:
        torch.set_num_threads(before)
    for e, (weight, b) in enumerate(layers):
        part = slice(int(offsets[e]), int(offsets[e + 1]))
        assert_close(found[part], (rows[part], weight, b))


def test_what_the_kernels_take():
    """Without this, all of the above could pass on the ops that stand in for the kernels."""
    rows, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert library.library("grouped_linear") is not None
    assert library.takes(rows, [weight], None)
    assert not library.takes(rows, [weight.double()], None)
    assert not library.takes(rows, [torch.randn(8, 5).t()], None)
    assert not library.takes(rows.half(), [weight.half()], None)
    assert not library.takes(rows, [weight, torch.randn(6, 8)], None)  # the kernel would read past its end
    assert not library.takes(rows, [weight], [torch.randn(4)])


def test_a_compiler_that_fails_is_warned_of_and_pytorchs_products_stand_in(monkeypatch):
    def failing(source: str) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(library, "compile_cpp", failing)
    library.library.cache_clear()
    library._warn.cache_clear()
    rows, weights = torch.randn(5, 4), [torch.randn(3, 4) for _ in range(2)]
    try:
        with pytest.warns(UserWarning, match=r"RuntimeError: no compiler here.*apt install g\+\+"):
            found = grouped_linear(rows, torch.tensor([0, 2, 5]), weights, None)
    finally:
        library.library.cache_clear()
    assert_close(found[:2], (rows[:2], weights[0], None))
    assert_close(found[2:], (rows[2:], weights[1], None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_pytorchs_own(dtype):
    rows, weights = torch.randn(5, 4).to(dtype), [torch.randn(3, 4).to(dtype) for _ in range(2)]
    found = grouped_linear(rows, torch.tensor([0, 2, 5]), weights, None)
    torch.testing.assert_close(found, torch.cat([F.linear(rows[:2], weights[0]), F.linear(rows[2:], weights[1])]))


def test_many_rows_a_group_take_the_product_for_many():
    rows, weights = torch.randn(1000, 6), [torch.randn(3, 6) for _ in range(2)]
    found = grouped_linear(rows, torch.tensor([0, 999, 1000]), weights, None)
    assert_close(found[:999], (rows[:999], weights[0], None))
    assert_close(found[999:], (rows[999:], weights[1], None))


def aten_body(function, *examples: Tensor) -> str:
    """The key of a body as the passes extract it: of ATen ops."""
    from moeca_compile._torch_private import trace_to_graph

    gm = trace_to_graph(function, *examples)
    return bodies.register(fx.GraphModule({}, gm.graph))


@pytest.mark.parametrize("per_expert_scale", [False, True])
def test_bodies_by_expert(per_expert_scale):
    """Whether its parameters enter linear layers only, and the experts run at once, or not, and they run in turn."""

    def swiglu(x, gate, up, bias, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up, bias), down)

    def scaled(x, gate, up, bias, down):
        return swiglu(x, gate, up, bias, down) * bias[: down.shape[0]]

    body = scaled if per_expert_scale else swiglu
    shapes = [(7, 4), (7, 4), (7,), (4, 7)]
    parameters = [torch.randn(shape) for _ in range(3) for shape in shapes]
    key = aten_body(body, torch.randn(2, 4), *parameters[:4])
    rows, offsets = torch.randn(6, 4), torch.tensor([0, 2, 2, 6])
    found = torch.cat([part for _, part in run_by_expert(key, [rows], offsets, parameters, 3)])
    expected = torch.cat([body(rows[:2], *parameters[:4]), body(rows[2:], *parameters[8:])])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("outputs", "target"), [(32, torch.ops.moeca.linear.default), (8, torch.ops.aten.linear.default)]
)
def test_a_compiled_step_takes_all_but_narrow_linear_layers_so(outputs, target):
    weight, x = torch.randn(outputs, 4), torch.randn(3, 4)

    def step(inputs, state, weights):
        return StepResult((F.linear(inputs[0], inputs[1]).relu(),), {}, None)

    traced = trace_step(step, [x, weight], Caches((), x.device), torch.zeros(2, 2, 2))
    with torch.no_grad():
        lowered = lower_alone(traced, "inductor", whole=True)
        assert [str(n.target) for n in traced.graph.graph.nodes if "linear" in str(n.target)] == [str(target)]
        (found,) = lowered([x, weight], {}, torch.zeros(2, 2, 2)).outputs
        torch.testing.assert_close(found, F.linear(x, weight).relu())


@pytest.mark.parametrize("bias", [False, True])
def test_schema_and_fake(bias):
    weight, b = layer(8, 5, torch.float32, bias)
    torch.library.opcheck(
        torch.ops.moeca.linear, (torch.randn(2, 3, 8), weight, b), test_utils=("test_schema", "test_faketensor")
    )
