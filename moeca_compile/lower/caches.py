"""Cached tensors as a trial step sees them: such a step must not change the real ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from moeca_compile.passes.rewrite.kinds import CacheSpec


class Caches(dict[str, Tensor]):
    """Cached tensors by name. Each access gives a copy, so ops may write to what they get.

    The copy lives as long as the step needs it: a trial holds copies of a few tensors, not of all. That suffices
    because one op of a step writes to a tensor and reads it; nothing reads it again afterwards.
    """

    def __init__(self, tensors: Mapping[str, Tensor], poisoned: Collection[str] = ()) -> None:
        super().__init__(tensors)
        self.nan = set(poisoned)

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return torch.full_like(tensor, float("nan")) if name in self.nan else tensor.clone()

    def poisoned(self, names: Collection[str]) -> Caches:
        """The same tensors, with NaN in those of these names."""
        return Caches(self, names)

    @staticmethod
    def empty(specs: Iterable[CacheSpec], device: torch.device) -> dict[str, Tensor]:
        """Caches without values, for a full step, which writes to none: zeros that take no memory."""
        return {s.name: torch.zeros((), dtype=s.dtype, device=device).expand(s.shape) for s in specs}
