"""An unmodified public model of two streams, as installed: HiDream's image transformer, at tiny size."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import caches_of, captured
from tests.public_models import random, tiny_hidream

hidream = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
BATCH, SIDE, STEPS = 2, 4, 6


def make_model() -> torch.nn.Module:
    """Two double-stream and two single-stream blocks, all with experts."""
    torch.manual_seed(0)
    model = tiny_hidream(num_layers=2, num_single_layers=2, text_emb_dim=6, llama_layers=[0, 1, 0, 1])
    return model.eval().requires_grad_(False)


def texts(seed: int = 1) -> tuple[Tensor, ...]:
    """Embeddings of T5 and Llama, and the pooled ones."""
    return random(BATCH, 3, 12, seed=seed), random(2, BATCH, 5, 10, seed=seed + 1), random(BATCH, 6, seed=seed + 2)


def test_all_of_it_is_one_graph_and_cached(without_inductor):
    """After the blocks the picture's size is read from a tensor, which was made of numbers: no break."""
    model = make_model()
    compiled = torch.compile(
        model, backend="moeca", options={"recipe": "moeca", "full_every": 3, "lowering": "eager"}
    )
    x = exact = random(BATCH, 4, 2 * SIDE, 2 * SIDE, seed=0)
    with torch.no_grad():
        for step in range(STEPS):
            t = torch.full((BATCH,), 1000 - 20 * step)
            x = x - compiled(x, t, *texts(), return_dict=False)[0] / 50
            exact = exact - model(exact, t, *texts(), return_dict=False)[0] / 50
    report = moeca_compile.report(compiled)
    found = [(region.kind, region.name) for region in report.regions]
    double, single = ([f"{kind}_stream_blocks.{i}.block" for i in range(2)] for kind in ("double", "single"))
    attentions = [f"{block}.attn1.{part}" for block in double for part in ("to_out", "to_out_t")]
    attentions += [f"{block}.attn1" for block in single]
    assert [name for kind, name in found if kind == "attention"] == attentions
    assert [name for kind, name in found if kind == "experts"] == [f"{block}.ff_i" for block in (*double, *single)]
    assert {region.status for region in report.regions} == {"cached"}
    assert report.graph_breaks == () and report.graphs == 1
    assert all(error < 1e-5 for error in report.validation_errors.values())
    assert report.steps["full"] == 2
    assert sum(report.steps.values()) == STEPS
    assert report.flops is not None
    assert report.flops.speedup > 1.5
    difference = (x - exact).abs().max()
    assert 0 < difference < 0.02 * exact.abs().max()


def patches(seed: int) -> tuple[Any, ...]:
    """(picture in patches, positions, sizes, mask), as for pictures that are not square: the last row is padding."""
    ids = torch.zeros(BATCH, SIDE * SIDE, 3)
    ids[..., 1], ids[..., 2] = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    mask = (torch.arange(SIDE * SIDE) < SIDE * (SIDE - 1)).float().expand(BATCH, -1)
    return random(BATCH, SIDE * SIDE, 16, seed=seed), ids, [(SIDE - 1, SIDE)] * BATCH, mask


def test_forced_recomputation_is_the_model(eager_steps):
    """With padded tokens, whose keys are masked; then the sizes are numbers, and the graph is one."""
    model = make_model()

    def arguments(seed: int, time: float) -> tuple[Any, ...]:
        picture, ids, sizes, mask = patches(seed)
        return (picture, torch.full((BATCH,), time), *texts(seed), ids, sizes, mask, None, False)

    graph = captured(model, *arguments(1, 900.0))
    loop = graph.loop(keys_values="chosen", shared="any")
    assert len(loop.compiled.regions.experts) == 4
    assert len(loop.compiled.regions.attentions) == 6
    assert loop.compiled.regions.skipped == ()

    def inputs(seed: int, time: float) -> list[Any]:
        bound = inspect.signature(model.forward).bind(*arguments(seed, time)).arguments
        return graph.arguments(**{name: value for name, value in bound.items() if isinstance(value, Tensor)})

    state, weights = caches_of(loop)
    full = loop.eager(StepKind(), inputs(1, 900.0), state, weights)
    state.store(full.updates)
    torch.testing.assert_close(full.outputs[0], model(*arguments(1, 900.0))[0], atol=1e-5, rtol=0)
    forced = StepKind(False, False, loop.compiled.plan.sizes[1], forced=True)
    again = loop.eager(forced, inputs(7, 300.0), state, weights)
    torch.testing.assert_close(again.outputs[0], model(*arguments(7, 300.0))[0], atol=1e-5, rtol=0)
