"""What the ranks of a model agree on, where its layers exchange rows with one another.

A rank that computes a layer, while another takes the same layer's output from its cache, would wait for ever. So all
must run the same kind of step at the same call, whatever their data say:

- A call is placed by its time, by the order of calls and by the user's marks alone, which are the same on all ranks.
  Arguments and pictures, which differ, are not looked at.
- At the first step of a stream, which is full everywhere, ranks compare what they would do: what they cache, the
  options and the time. Where these differ (a region failed its validation on one rank, say), all steps are full.
- The capacity of a stream is the most that any rank needs, and does not grow.
- The numbers by which a recipe decides (TeaCache, say) are means over the ranks. Under error control the largest
  error of all ranks counts. Where the sampler is stochastic on one rank, or nothing says what it is, so it is on all:
  a full step's error is found on all ranks or on none.
- Nothing is validated again later, and an error is raised: the model itself would not run in step with the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moeca_compile._torch_private import group_by_name

DIFFERENT = (
    "the ranks that exchange rows would not cache the same: {0} here, and something else on another rank. Every step "
    "is a full step, so sampling is no faster. Call the model with the same timesteps and options on all ranks, and "
    "look at the other warnings, on each of them"
)
SEVERAL = (
    "its layers exchange rows through {0} process groups, and ranks agree on what a cache step is within one alone. "
    "Every step is a full step, so sampling is no faster. Let all layers use one group"
)
UNCLEAR = (
    "its ranks exchange rows, and which input is the timestep would be told by what the calls hold, which is not the "
    "same on all of them. Every step is a full step, so sampling is no faster. Mark each call with "
    "moeca_compile.step(time)"
)


class Ranks:
    """The ranks with which this process runs a model together.

    Args:
        groups: the names of the process groups through which its layers exchange rows.
        device: where the model runs.

    Attributes:
        joined: whether there are any; the process runs the model by itself else.
    """

    def __init__(self, groups: Sequence[str], device: torch.device) -> None:
        self.groups, self.device, self.joined = tuple(groups), device, bool(groups)

    def alike(self, form: object) -> bool:
        """Whether all ranks call this with the same."""
        digest = int.from_bytes(hashlib.sha256(repr(form).encode()).digest()[:8], "big", signed=True)
        return len(self.groups) == 1 and len({*self._of_all(torch.tensor([digest])).tolist()}) == 1

    def all_say(self, said: bool | None) -> bool | None:
        """What all ranks say: False where one says so, True where all do, and else None."""
        if not self.joined:
            return said
        doubts = (True, None, False)
        return doubts[int(self.most(doubts.index(said)))]

    def most(self, number: float) -> float:
        """The largest of all ranks' numbers."""
        return float(self._of_all(torch.tensor([number], dtype=torch.float64)).max()) if self.joined else number

    def mean(self, number: float) -> float:
        """The mean of all ranks' numbers."""
        return float(self._of_all(torch.tensor([number], dtype=torch.float64)).mean()) if self.joined else number

    def _of_all(self, value: Tensor) -> Tensor:
        """What all ranks bring, (1,) each, in the order of ranks."""
        (name,) = self.groups
        group, value = group_by_name(name), value.to(self.device)
        found = [torch.empty_like(value) for _ in range(group.size())]
        dist.all_gather(found, value, group=group)
        return torch.cat(found)
