"""In 16 bits, rounding raises no alarm on the published models, whatever the weights and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from examples import families
from tests.lower.low_precision import LowPrecision, products_in_float32, with_wide_intermediates

SIZES = {
    "DSMoE-S-E16": 2,
    "DSMoE-S-E48": 2,
    "DiT-MoE-S": 1,
    "Diff-MoE-S": 2,
    "DiffMoE-S-E16": 2,
}
"""Published widths, experts and routing, with so many blocks and 16 tokens an image, as CPUs are slow in 16 bits."""
FAMILIES = ["DiT", "TC-DiT", "EC-DiT"]
"""Published families whose smallest models are large, in their reduced form."""
SEEDS = 20


def model_of(name: str) -> families.DiffusionTransformer:
    if name in FAMILIES:
        return families.reduced(name)
    family, sizes = families.PUBLISHED[name]
    return families.assemble(family, replace(sizes, depth=SIZES[name], side=8))


@pytest.fixture
def fast_products() -> Iterator[None]:
    with products_in_float32():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_float32_are_the_cpus_own(dtype):
    """All but a few values are equal, and those are neighbors."""
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((64, 384), (512, 384), (512,)))
    for given in ((x, weight), (x, weight, bias)):
        own = torch.nn.functional.linear(*given)
        with products_in_float32():
            found = torch.nn.functional.linear(*given)
        assert found.dtype == dtype
        assert (found != own).double().mean() < 0.01
        torch.testing.assert_close(found, own, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SIZES, *FAMILIES])
def test_rounding_raises_no_alarm(name, dtype):
    model = LowPrecision.of(model_of(name), dtype, "fora" if name == "DiT" else "moeca")
    steps = {kind: model.step(kind, with_wide_intermediates) for kind in model.kinds()}
    for seed in range(SEEDS):
        found, notes = model.regions(seed)
        assert found.skipped == model.compiled.regions.skipped, (seed, notes.warnings)
        assert notes.warnings == []
        for kind, step in steps.items():
            sound, notes = model.same(kind, step, seed)
            assert sound, (seed, kind.name, notes.warnings)
