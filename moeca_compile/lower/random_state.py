"""Random numbers in trial runs: the same ones in every run, and none of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The state of the generators that ops draw from by default, on the CPU and on `device`, when this is made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Draw again what has been drawn since."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the random number generators afterwards. Runs one after another under this draw the same numbers."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
