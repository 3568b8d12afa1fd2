"""FLOPs counted on traced steps, against a hand count of the test model."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.lower.program import trace_step
from moeca_compile.passes.analysis.flops import StepFlops, step_flops
from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import Captured, caches_of, exported
from tests.models import Sizes
from tests.test_plan import COST, DENSE, MOE, counted

CACHE = StepKind(attention=False, experts=False)


def flops_of(graph: Captured, kind: StepKind, **options) -> StepFlops:
    loop = graph.loop(validate=False, **options)
    return trace_step(loop.compiled.function(kind), graph.inputs, *caches_of(loop)).flops


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize("recipe", ["none", "moeca", "moeca-forecast", "fora", "stack", "block"])
def test_a_full_step_costs_what_the_model_does(graph, model, recipe):
    assert flops_of(graph, StepKind(), recipe=recipe).total() == counted(model, 2)


@pytest.mark.usefixtures("eager_steps")
def test_a_cache_step_that_recomputes_nothing_saves_what_it_skips(graph, model):
    """All but the first attention's keys and values fall away; the routers run."""
    found = flops_of(graph, CACHE, recipe="moeca", keys_values="none")
    skipped = 4 * COST.attention + DENSE * COST.dense + MOE * (COST.branches + COST.shared)
    assert found.ragged == ()
    assert found.total() == counted(model, 2) - skipped


@pytest.mark.usefixtures("eager_steps")
def test_recomputed_branches_are_put_in_as_they_were_counted(graph, model):
    """Half of the tokens have room: their attention and feed-forwards count whole, branches as many as ran.

    Nothing is recomputed in the first block, which no MoE layer stands before.
    """
    sizes, half = Sizes(), Sizes().tokens // 2
    found = flops_of(graph, StepKind(False, False, capacity=half), recipe="moeca", keys_values="none", shared="any")
    per_branch = 3 * 2 * sizes.width * sizes.expert_width
    assert [op.per_branch for op in found.ragged] == [per_branch] * MOE
    assert all(op.refreshes for op in found.ragged)
    assert found.total([10.0, 4.5]) - found.total([0, 0]) == 14.5 * per_branch
    # what a full step has, with half of the rows, and the routers a second time on the refreshed rows
    rows = 3 * COST.attention // 2 + (DENSE - 1) * COST.dense // 2 + MOE * COST.shared // 2
    full = counted(model, 2)
    rest = full - 4 * COST.attention - DENSE * COST.dense - MOE * (COST.branches + COST.shared)
    assert found.total() == rest + rows + MOE * COST.router // 2


def test_products_attention_and_convolutions_by_hand():
    def function(x, w, kernel):
        y = torch.nn.functional.linear(x, w)  # 2 x 5 x 6, 4 -> 6
        q = y.view(2, 5, 1, 6).transpose(1, 2)
        a = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return a, torch.nn.functional.conv1d(x.transpose(1, 2), kernel), x.softmax(-1).sum()

    gm = exported(function, torch.randn(2, 5, 4), torch.randn(6, 4), torch.randn(3, 4, 2))
    linear, attention, convolution = 2 * 10 * 4 * 6, 2 * 2 * 2 * 5 * 5 * 6, 2 * 2 * 3 * 4 * (4 * 2)
    assert step_flops(gm.graph) == StepFlops(linear + attention + convolution)
