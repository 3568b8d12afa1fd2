"""The cached tensors of one stream: allocated when first used, with the slot of each ring that is filled next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from moeca_compile._torch_private import zero_all
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, StepKind


class Caches(dict[str, Tensor]):
    """Cached tensors by name. One that is read before anything was stored is allocated then, with zeros.

    The name of a ring with several slots stands for the slot that the next step of its part fills: the oldest.

    Attributes:
        filled: for each part (by its row), how many steps have filled its slots.
        slots: for each part (by its row), how many slots its largest ring has.
    """

    def __init__(self, specs: Sequence[CacheSpec], device: torch.device) -> None:
        super().__init__()
        self.specs, self.device = {spec.name: spec for spec in specs}, device
        self.filled = [0, 0]
        self.rings: dict[str, list[CacheSpec]] = {}
        self.slots = [1, 1]
        for spec in specs:
            if spec.part is not None:
                ring, row = self.rings.setdefault(spec.ring, []), spec.part.row
                ring.append(spec)
                self.slots[row] = max(self.slots[row], len(ring))

    def __missing__(self, name: str) -> Tensor:
        slot = self.slot(name)
        if slot == name:
            self[name] = self.zeros(name)
        return self[slot]

    def zeros(self, name: str) -> Tensor:
        spec = self.specs[name]
        return torch.zeros(spec.shape, dtype=spec.dtype, device=self.device)

    def slot(self, name: str) -> str:
        """The name of the tensor that a value stored under `name` goes to."""
        slots = self.rings.get(name)
        if slots is None:
            return name
        assert slots[0].part is not None
        return slots[self.filled[slots[0].part.row] % len(slots)].name

    def slots_filled_by(self, kind: StepKind) -> tuple[int, ...]:
        """Which slots a step of this kind fills: for each part that it computes, the number of the slot."""
        rows = (part.row for part in (Part.ATTENTION, Part.EXPERTS) if kind.computes(part))
        return tuple(self.filled[row] % self.slots[row] for row in rows)

    def release(self, kind: StepKind) -> None:
        """Drop what a step of this kind replaces and does not read, so that its memory is free for the new values."""
        if not (kind.attention or kind.experts):
            return
        for ring, (first, *_) in self.rings.items():
            if first.part is not None and kind.computes(first.part):
                self.pop(self.slot(ring), None)

    def store(self, updates: Mapping[str, Tensor]) -> None:
        """Take a step's new values in place of the old ones, without a copy."""
        self.update({self.slot(name): value for name, value in updates.items()})

    def prepare(self) -> None:
        """Allocate all tensors, and set those to 0 that the first step of a generation may read."""
        for name in self.specs:
            _ = self[name]
        read = [self[name] for name, spec in self.specs.items() if spec.part is None]
        if read:
            zero_all(read)

    def cloned(self) -> Caches:
        """Copies of the tensors, for a step that nothing shall remain of."""
        copies = Caches(list(self.specs.values()), self.device)
        copies.filled = [*self.filled]
        copies.update({name: tensor.clone() for name, tensor in self.items()})
        return copies


class Untouched(Caches):
    """Caches as a trial step sees them: caches[name] is a copy, so nothing that the step writes remains.

    A copy lives as long as the step needs it, so a trial holds copies of a few tensors, not of all. That suffices
    because one op of a step writes to a tensor and reads it; nothing reads it again afterwards.

    Args:
        caches: the real ones, which stay as they are.
        poisoned: names of tensors that are seen full of NaN.
    """

    def __init__(self, caches: Caches, poisoned: Collection[str] = ()) -> None:
        super().__init__(list(caches.specs.values()), caches.device)
        self.filled, self.poisoned = [*caches.filled], frozenset(poisoned)
        self.update(caches)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.poisoned:
            return torch.full_like(super().__getitem__(name), float("nan"))
        return super().__getitem__(name).clone() if name in self else self.__missing__(name)

    def __missing__(self, name: str) -> Tensor:
        slot = self.slot(name)
        return self.zeros(name) if slot == name else self[slot]
