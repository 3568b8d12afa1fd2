"""LoRA adapters as files hold them, and pipelines to which the same is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.pipelines.tiny import draw


def adapter(model: Any, layers: tuple[str, ...], seed: int, rank: int = 2) -> dict[str, Tensor]:
    """What a file holds for the products of these names, none of it zero."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        product = getattr(module, "base_layer", module)
        if isinstance(product, torch.nn.Linear) and name.split(".")[-1] in layers:
            for half, shape in (("A", (rank, product.in_features)), ("B", (product.out_features, rank))):
                values = 0.3 * torch.randn(shape, generator=generator)
                found[f"transformer.{name}.lora_{half}.weight"] = values
    assert found
    return found


class Pair:
    """An enabled pipeline, and one that is not, to which the same is done. Each change has to change the picture."""

    def __init__(self, make: Callable[[], Any], **arguments: Any) -> None:
        self.pipe, self.plain, self.arguments = make(), make(), arguments
        self.last: Tensor | None = None

    def do(self, change: Callable[[Any], Any]) -> None:
        for pipe in (self.pipe, self.plain):
            change(pipe)

    def load(self, name: str, layers: tuple[str, ...], seed: int, **options: Any) -> None:
        self.do(lambda pipe: pipe.load_lora_weights(adapter(pipe.transformer, layers, seed), name, **options))

    def compare(self, changed: bool = True) -> None:
        expected = draw(self.plain, 2, **self.arguments)
        torch.testing.assert_close(draw(self.pipe, 2, **self.arguments), expected, atol=2e-6, rtol=1e-5)
        if self.last is not None:
            assert ((expected - self.last).norm() > 1e-3 * expected.norm()) == changed
        self.last = expected
