"""Costs against counted operations, bytes against tensors, capacities."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import captured
from tests.models import Sizes, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("eager_steps")


def counted(model, batch: int) -> int:
    """Floating-point operations of the eager model."""
    noise, labels = make_inputs(model, batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(noise, torch.ones(batch), labels)
    return counter.get_total_flops()


def plan_of(graph, **options):
    return graph.loop(validate=False, **options).compiled.plan


CACHE = StepKind(attention=False, experts=False)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(depth=3, experts=4, top_k=3, width=64), Sizes(depth=1, side=4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_full_step_costs_what_the_model_does(sizes, batch):
    model = make_model(sizes)
    noise, labels = make_inputs(model, batch)
    plan = plan_of(captured(model, noise, torch.ones(batch), labels))
    assert plan.flops(StepKind()) == counted(model, batch)


def linear(rows: int, inside: int, outside: int) -> int:
    return 2 * rows * inside * outside


class Cost:
    """FLOPs of TinyDiTMoE's parts at a batch, by hand."""

    def __init__(self, sizes: Sizes, batch: int) -> None:
        d, n, rows = sizes.width, sizes.tokens, batch * sizes.tokens
        self.key_value_query = linear(rows, d, 3 * d)
        self.attention = self.key_value_query + 2 * 2 * batch * n * n * d + linear(rows, d, d)
        self.dense = 2 * linear(rows, d, 4 * d)
        self.branches = 3 * linear(rows * sizes.top_k, d, sizes.expert_width)
        self.shared = 3 * linear(rows, d, 2 * sizes.expert_width)
        self.router = linear(rows, d, sizes.experts)


COST = Cost(Sizes(), 2)
ATTENTIONS, DENSE, MOE = 4, 2, 2


def saved(graph, kind: StepKind = CACHE, chosen: float = 0.0, recomputed: float = 0.0, **options) -> float:
    plan = plan_of(graph, **options)
    return plan.flops(StepKind()) - plan.flops(kind, chosen, recomputed)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recipe": "none"}, 0),
        (
            {"keys_values": "none", "shared": "never"},
            ATTENTIONS * COST.attention + DENSE * COST.dense + MOE * (COST.branches + COST.shared),
        ),
        (
            {"keys_values": "all", "shared": "always"},
            ATTENTIONS * (COST.attention - COST.key_value_query) + DENSE * COST.dense + MOE * COST.branches,
        ),
        (
            {"recipe": "fora"},
            ATTENTIONS * COST.attention + DENSE * COST.dense + MOE * (COST.branches + COST.shared + COST.router),
        ),
    ],
    ids=str,
)
def test_a_cache_step_without_recomputation_saves_what_it_skips(graph, options, expected):
    assert saved(graph, **options) == expected


def test_a_stack_step_leaves_the_embedding_and_the_head(graph, model):
    """And what conditions the blocks: their adaLN is within the stack and not computed token by token."""
    sizes, batch = Sizes(), 2
    left = plan_of(graph, recipe="stack").flops(CACHE)
    embedding = linear(batch * sizes.tokens, sizes.patch**2, sizes.width)
    head = linear(batch * sizes.tokens, sizes.width, sizes.patch**2) + linear(batch, sizes.width, 2 * sizes.width)
    condition = 2 * linear(batch, sizes.width, sizes.width)
    blocks = sizes.depth * linear(batch, sizes.width, 6 * sizes.width)
    assert left in (embedding + head + condition, embedding + head + condition + blocks)


def test_savings_are_those_of_the_tokens_and_branches_reused(graph):
    options = {"keys_values": "none", "shared": "any"}
    token_wise = ATTENTIONS * COST.attention + DENSE * COST.dense + MOE * COST.shared
    assert saved(graph, chosen=0.25, recomputed=0.125, **options) == pytest.approx(
        0.75 * token_wise + 0.875 * MOE * COST.branches
    )
    assert saved(graph, chosen=1.0, recomputed=1.0, **options) == pytest.approx(0)


def test_the_parts_are_saved_apart(graph):
    options = {"keys_values": "none", "shared": "never"}
    attention = saved(graph, StepKind(attention=False, experts=True), **options)
    experts = saved(graph, StepKind(attention=True, experts=False), **options)
    assert attention == ATTENTIONS * COST.attention
    assert attention + experts == saved(graph, **options)


@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "fora", "fora-forecast", "stack", "stack-forecast"])
def test_bytes_are_those_of_the_tensors(graph, recipe):
    loop = graph.loop(validate=False, recipe=recipe)
    _, stream, _ = loop.enter(graph.inputs)
    stream.state.prepare()
    assert loop.compiled.plan.nbytes == loop.streams.nbytes > 0


def test_bytes_by_hand(graph):
    held = plan_of(graph, recipe="stack").nbytes
    assert held == 2 * 16 * 32 * 4
    assert plan_of(graph, recipe="stack-forecast").nbytes == 2 * held
    assert plan_of(graph, recipe="stack", cache_dtype="bfloat16").nbytes == held // 2
    assert plan_of(graph, recipe="fora").nbytes == 8 * held
    assert plan_of(graph, recipe="none").nbytes == 0


@pytest.mark.parametrize("ladder", [(1.0,), (0.1, 0.5, 1.0), (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)])
def test_capacities_are_the_ladder_in_tokens(graph, ladder):
    plan = plan_of(graph, capacities=ladder)
    assert plan.capacities == tuple(ceil(fraction * 16) for fraction in ladder)


@pytest.mark.parametrize(("budget", "capacity"), [(0.0, 0), (0.1, 3), (0.25, 8), (0.9, 16)])
def test_a_budget_has_one_capacity(graph, budget, capacity):
    """As many tokens as it has branches, in case that each is another token's."""
    assert plan_of(graph, budget=budget).capacities == (capacity,)
