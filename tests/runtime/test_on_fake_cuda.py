"""Steps as they are traced for CUDA, on fake tensors: nothing in them needs the host, whatever the model and recipe.

The ops of this package are opaque here; that theirs need no host is a matter of their own tests.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from examples import families
from moeca_compile.passes.analysis.host_ops import host_ops, ops_without_kernel
from moeca_compile.passes.rewrite.kinds import PROBE, StepKind
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model
from tests.runtime.fake_cuda import CUDA, OnFakeCuda
from tests.runtime.joint_models import DoubleThenSingle, ExpertsForBoth, SingleStream, make_text

RECIPES = ("moeca", "moeca-forecast", "stack-forecast", "fora")
DECIDING = ("teacache", "block-cache", "magcache")
EVERY_RECIPE = ("DSMoE", "EC-DiT")  # what forecasts is more than what does not, so the others do with that
OPAQUE = {
    "moeca.fixed_k_outputs.default",
    "moeca.fixed_k_outputs_into.default",
    "moeca.refresh_fixed_k.default",
    "moeca.variable_k_outputs.default",
    "moeca.variable_k_outputs_into.default",
    "moeca.refresh_variable_k.default",
    "moeca.attend_rows.default",
}


def kinds(recipe: str, experts: bool) -> list[StepKind]:
    """A full step, one that reuses all, and where branches are recomputed, one with room for some of them."""
    found = [StepKind(), StepKind(False, False)]
    if recipe in DECIDING:
        found.append(PROBE)
    return [*found, StepKind(False, False, capacity=4)] if experts and recipe.startswith("moeca") else found


def assert_needs_no_host(model: OnFakeCuda, recipe: str, cached: bool = True, **options) -> None:
    compiled = model.compiled(recipe=recipe, **options)
    assert compiled.device == CUDA
    assert compiled.caching == cached
    for kind in kinds(recipe, bool(compiled.regions.experts)):
        graph = model.step(compiled, kind)
        assert host_ops(graph, CUDA) == [], kind.name
        assert set(ops_without_kernel(graph, CUDA)) <= OPAQUE
        outside = {getattr(node.target, "namespace", "aten") for node in graph.nodes if node.op == "call_function"}
        assert outside <= {"aten", "moeca", "prims"}


def recipes_for(family: str) -> tuple[str, ...]:
    if family in EVERY_RECIPE:
        return RECIPES
    return ("moeca-forecast", "fora") if family == "DiT" else ("moeca-forecast",)


@pytest.mark.sampled(8)
@pytest.mark.filterwarnings("ignore:moeca. recipe")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_step_of_a_family_needs_the_host(family):
    model = families.reduced(family)
    fake = OnFakeCuda(model, families.inputs_for(model))
    for recipe in recipes_for(family):
        assert_needs_no_host(fake, recipe, cached=family != "DiT" or not recipe.startswith("moeca"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [ExpertsForBoth, DoubleThenSingle, SingleStream])
def test_nor_where_picture_and_text_attend_together(kind):
    model = kind().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    fake = OnFakeCuda(model, (noise, torch.ones(2), labels, make_text(2)))
    assert_needs_no_host(fake, "moeca")


@pytest.fixture(scope="module")
def tiny() -> OnFakeCuda:
    model = make_model(Sizes(depth=2))
    noise, labels = make_inputs(model)
    return OnFakeCuda(model, (noise, torch.ones(2), labels))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {"score": "staleness", "overwrite": False},
        {"budget": 0.25, "keys_values": "none"},
        {"mask_source": "previous", "keys_values": "all"},
        {"budget": None, "entropy": "minmax", "statistic": "batch", "shared": "always"},
    ],
    ids=str,
)
def test_nor_under_other_options(tiny, options):
    assert_needs_no_host(tiny, "moeca-forecast", **{"budget": 0.25, **options})


@pytest.mark.parametrize("recipe", DECIDING)
def test_nor_do_steps_and_probes_that_decide_by_the_data(tiny, recipe):
    """What a probe says is copied beside the graph."""
    assert_needs_no_host(tiny, recipe)


def test_a_router_of_groups_reads_the_chosen_tokens_alone_when_they_are_routed_again():
    """Its marks of groups are computed for rows: two layers have three top-k for all 32 tokens, and three for 8."""
    model = families.reduced("DSMoE")
    fake = OnFakeCuda(model, families.inputs_for(model))
    graph = fake.step(fake.compiled(recipe="moeca"), StepKind(False, False, capacity=4))
    topks = graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    assert Counter(node.meta["val"][0].shape[0] for node in topks) == {32: 6, 8: 6}


# --- an argument on the CPU -----------------------------------------------------------------------------------


class TimeFromTheHost(TinyDiTMoE):
    """Takes its timestep from wherever it lies, as pipelines give it, and has a table that is made on the CPU."""

    def embed_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.arange(1, 2).to(x.device)
        return super().embed_inputs(x, (t[None] * 0.5).to(x.device).expand(len(x)) * scale, y)


def test_a_timestep_on_the_cpu_is_copied_before_the_step():
    torch.manual_seed(0)
    model = TimeFromTheHost().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    fake = OnFakeCuda(model, (noise, torch.tensor(1.0), labels), stay=("t",))
    assert_needs_no_host(fake, "moeca")
    compiled = fake.compiled()
    (place,) = compiled.uploaded
    assert fake.inputs[place].device.type == "cpu"
    assert compiled.regions.timesteps == (compiled.placeholders[place],)


def test_on_a_cpu_nothing_is_copied(graph):
    assert graph.loop(validate=False).compiled.uploaded == ()


# --- what Inductor makes of a step -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_blocks() -> OnFakeCuda:
    model = make_model(Sizes(depth=2))
    noise, labels = make_inputs(model)
    return OnFakeCuda(model, (noise, torch.ones(2), labels))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (StepKind(), {"fixed_k_outputs_into": 1}),
        (StepKind(False, False, capacity=4), {"attend_rows": 1, "refresh_fixed_k": 1}),
        (StepKind(False, False), {}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_code_for_cuda_needs_no_host(two_blocks, kind, own):
    """Kernels, products, our ops, and what has no code of Inductor's own; nothing of it on the CPU."""
    pytest.importorskip("triton", reason="Inductor writes no code for CUDA without it")
    from tests.runtime.cuda_code import cuda_code

    compiled = two_blocks.compiled(recipe="moeca-forecast", budget=0.25)
    code = cuda_code(two_blocks.step(compiled, kind).owning_module, two_blocks.mode)
    called = code[code.rindex("def call(") :]
    ops = Counter(re.findall(r"torch\.ops\.(\w+\.\w+)\.\w+\(", called))
    assert {name.removeprefix("moeca."): count for name, count in ops.items() if name.startswith("moeca.")} == own
    assert {name for name in ops if not name.startswith("moeca.")} <= {"aten.convolution", "aten.topk", "aten.sort"}
    assert called.count(".run(") > 10
    for word in (".item(", ".tolist(", ".cpu(", "empty_strided_cpu(", "device='cpu'", "synchronize"):
        assert word not in called, word
