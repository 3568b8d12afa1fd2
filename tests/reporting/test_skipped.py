"""What the report says of an attention that no recipe understands: whether it runs at every step is counted."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import moeca_compile
from tests.models import CappedAttention, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
REASON = "its scores are not products of queries and keys with scales, biases and masks only"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("recipe", "status"), [("moeca", "skipped"), ("fora", "cached"), ("stack", "cached"), ("block", "cached")]
)
def test_what_is_cached_with_the_branch_or_the_blocks_around_it_is_not_called_skipped(recipe, status):
    model = make_model()
    model.blocks[2].attn = CappedAttention(32, 4).eval().requires_grad_(False)
    x, labels = make_inputs(model)
    fast = torch.compile(model, backend="moeca", options={"recipe": recipe, "full_every": 2, "lowering": "eager"})
    counts = []
    with torch.no_grad():
        for step in range(4):
            with torch.profiler.profile() if step > 1 else nullcontext() as seen:  # the first two are compiled
                fast(x, torch.full((len(x),), 1 - step / 4), labels)
            counts.append(sum(event.name == "aten::tanh" for event in seen.events()) if seen else None)
    (found,) = (r for r in moeca_compile.report(fast).regions if (r.kind, r.name) == ("attention", "blocks.2.attn"))
    assert found.status == status and REASON in found.reason
    assert counts[2] == 1 and (counts[3] == 0) == (status == "cached")
