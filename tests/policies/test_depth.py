"""Spans of blocks, in models of one and of several token streams: cache steps on a full step's inputs are exact."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.passes.rewrite.kinds import REUSING, StepKind
from moeca_compile.policies.depth import depth_of, spans
from tests.harness import caches_of, captured
from tests.models import make_inputs
from tests.runtime.joint_models import (
    SIZES,
    DoubleThenSingle,
    SingleStream,
    Streams,
    TextEndsEarly,
    TextFirst,
    TokensForABlock,
    make_text,
)

pytestmark = pytest.mark.usefixtures("eager_steps")


def of(kind: type[Streams]):
    """A captured model, and its inputs."""
    model = kind().eval().requires_grad_(False)
    x, y = make_inputs(model)
    return captured(model, x, torch.ones(2), y, make_text())


@pytest.mark.sampled(5)
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        (Streams, (2, 2)),
        (TextFirst, (2, 2)),
        (TextEndsEarly, (1, 2)),
        (SingleStream, (1, 1)),
        (DoubleThenSingle, (1, 2)),
        (TokensForABlock, (1, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_of_two_blocks_is_cached_in_every_stream_that_needs_it(kind, streams, last):
    graph = of(kind)
    loop = graph.loop(recipe="deepcache", first_blocks=1 - last, last_blocks=last)
    assert depth_of(loop.compiled.regions) == 2
    assert len(loop.compiled.plan.replacements) == streams[last]
    (state, weights), inputs = caches_of(loop), graph.inputs
    full = loop.eager(StepKind(), inputs, state, weights)
    state.store(full.updates)
    again = loop.eager(REUSING, inputs, state, weights)
    torch.testing.assert_close(again.outputs, full.outputs, atol=1e-5, rtol=1e-5)
    for value in state.values():  # and it is read
        value.copy_(torch.randn_like(value))
    changed = loop.eager(REUSING, inputs, state, weights)
    assert not torch.allclose(changed.outputs[0], full.outputs[0], atol=1e-3)
    assert loop.compiled.plan.flops(REUSING) < 0.9 * loop.compiled.plan.flops(StepKind())


class TwoSingleBlocks(DoubleThenSingle):
    """Picture and text are joined after the first of three blocks."""

    def run(self, h, text, c):
        h, text = self.block(self.picture[0], self.words[0], h, text, c)
        z = torch.cat([h, text], 1)
        for _ in range(2):
            z = self.single(self.picture[1], z, c)
        return z[:, : SIZES.tokens]


def test_no_span_begins_in_several_streams_and_ends_in_one():
    graph = of(TwoSingleBlocks)
    regions = graph.loop(recipe="stack", validate=False).compiled.regions
    counts = {(a, b): len(spans(regions, a, b)) for a in range(3) for b in range(a + 1, 4)}
    assert counts == {(0, 1): 2, (0, 2): 0, (0, 3): 1, (1, 2): 0, (1, 3): 1, (2, 3): 1}
    for recipe, options in (("deepcache", {}), ("delta", {"cached_blocks": 0.6})):
        with pytest.warns(UserWarning, match="nothing that it could cache.*joined"):
            assert not graph.loop(recipe=recipe, **options).compiled.caching
    assert graph.loop(recipe="delta", cached_blocks=0.3).compiled.caching


def test_depths_out_of_order_are_no_span(graph):
    regions = graph.loop(recipe="stack", validate=False).compiled.regions
    assert depth_of(regions) == 4
    assert spans(regions, 0, 4) == list(regions.stacks)
    assert [spans(regions, *ends) for ends in ((-1, 2), (2, 2), (3, 2), (0, 5))] == [[]] * 4
    (before,), (after,) = spans(regions, 1, 2), spans(regions, 2, 3)
    assert before[1] is after[0]
