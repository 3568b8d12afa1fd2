"""An unmodified public model whose picture attends to itself and a text: Nucleus in diffusers, at tiny size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import caches_of, captured
from tests.public_models import tiny_nucleus

BATCH, SIDE, TEXT = 2, 4, 5
pytestmark = [
    pytest.mark.usefixtures("eager_steps"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


def make_model() -> torch.nn.Module:
    """A dense block, then two with experts that choose their tokens."""
    torch.manual_seed(0)
    model = tiny_nucleus(in_channels=8, out_channels=2, num_layers=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # its experts are left uninitialized
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


@pytest.mark.parametrize("padded", [False, True], ids=["a text of full length", "a padded text"])
def test_all_of_it_is_cached_and_forced_recomputation_is_the_model(padded):
    model = make_model()
    mask = (torch.arange(TEXT) < TEXT - 1).expand(BATCH, -1) if padded else None

    def arguments(seed: int, time: float) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        picture = torch.randn(BATCH, SIDE * SIDE, 8, generator=generator)
        text = torch.randn(BATCH, TEXT, 12, generator=generator)
        return picture, [(1, SIDE, SIDE)] * BATCH, text, mask, torch.full((BATCH,), time), None, False

    graph = captured(model, *arguments(1, 0.9))
    loop = graph.loop(keys_values="chosen", shared="any")
    regions = loop.compiled.regions
    assert [a.name for a in regions.attentions] == [f"transformer_blocks.{i}.attn" for i in range(3)]
    assert [e.name for e in regions.experts] == [f"transformer_blocks.{i}.img_mlp" for i in (1, 2)]
    assert regions.skipped == ()
    assert all(attention.by_token for attention in regions.attentions), "keys and values are cached"

    def inputs(seed: int, time: float) -> list[Any]:
        picture, _, text, _, t, *_ = arguments(seed, time)
        return graph.arguments(hidden_states=picture, encoder_hidden_states=text, timestep=t)

    state, weights = caches_of(loop)
    full = loop.eager(StepKind(), inputs(1, 0.9), state, weights)
    state.store(full.updates)
    torch.testing.assert_close(full.outputs[0], model(*arguments(1, 0.9))[0], atol=1e-5, rtol=0)
    forced = StepKind(False, False, loop.compiled.plan.sizes[1], forced=True)
    again = loop.eager(forced, inputs(7, 0.3), state, weights)
    torch.testing.assert_close(again.outputs[0], model(*arguments(7, 0.3))[0], atol=1e-5, rtol=0)
