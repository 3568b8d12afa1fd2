"""How much the ranks of an expert-parallel model send to one another in a step, by kind of step.

torchrun --nproc-per-node 4 -m bench.exchange
torchrun --nproc-per-node 2 -m bench.exchange --model DiT-MoE-S --batch 2

Bytes are counted at the call of `all_to_all_single`: what leaves a rank, the mean over ranks. Prints a table with a
row for each kind of step, and a column for each way of writing the layers (examples/families/expert_parallel.py).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moeca_compile
from examples import families
from examples.families.expert_parallel import CountedLayer, DividedLayer, PaddedLayer, divided
from examples.machine import environment
from examples.testbed.arguments import whole_number
from moeca_compile.ops.exchange import is_alone

LAYERS: dict[str, type[DividedLayer]] = {"by counts": CountedLayer, "in blocks": PaddedLayer}
SHARE = 1 / 16
"""The share of branches that a cache step recomputes."""
STEPS: dict[str, tuple[Mapping[str, Any], int]] = {
    "full step": ({"budget": SHARE}, 0),
    "cache step, 1/16 recomputed": ({"budget": SHARE}, 2),
    "cache step, budget 0": ({"budget": 0.0}, 2),
}
"""The options of a kind of step, and its number: the first cache step of a stream, which finds its capacity, sends
more."""


@dataclasses.dataclass
class Sent:
    """calls: of `all_to_all_single`; bytes: what left this rank in them; agreements: calls of `all_gather`."""

    calls: int = 0
    bytes: int = 0
    agreements: int = 0

    def since(self, before: Sent) -> Sent:
        return Sent(self.calls - before.calls, self.bytes - before.bytes, self.agreements - before.agreements)


@contextmanager
def counted() -> Iterator[Sent]:
    """Counts what reaches other ranks. What one rank plays alone, in checks, does not."""
    sent, all_to_all, all_gather = Sent(), dist.all_to_all_single, dist.all_gather

    def counting(out: Tensor, given: Tensor, taken: Any = None, sizes: Any = None, group: Any = None) -> Any:
        if not is_alone():
            parts = given.split(sizes) if sizes else given.chunk(dist.get_world_size(group))
            sent.calls += 1
            sent.bytes += sum(part.nbytes for rank, part in enumerate(parts) if rank != dist.get_rank(group))
        return all_to_all(out, given, taken, sizes, group=group)

    def gathering(*args: Any, **kwargs: Any) -> Any:
        sent.agreements += 1
        return all_gather(*args, **kwargs)

    dist.all_to_all_single, dist.all_gather = counting, gathering
    try:
        yield sent
    finally:
        dist.all_to_all_single, dist.all_gather = all_to_all, all_gather


def bytes_by_step(whole: Any, layer: type[DividedLayer], batch: int) -> dict[str, float]:
    """The mean over ranks of the bytes that leave one in a step, by the kind of step."""
    model, (x, t, y) = divided(whole, layer), families.inputs_for(whole, batch, seed=dist.get_rank())
    found = {}
    with counted() as sent, torch.no_grad():
        model(x, t, y)
        found["uncached"] = sent.bytes
        for name, (options, number) in STEPS.items():
            torch._dynamo.reset()
            every = {"recipe": "moeca", "full_every": 4, "lowering": "eager", **options}
            fast = torch.compile(model, backend="moeca", options=every)
            with moeca_compile.generation():
                for step in range(number + 1):
                    before = dataclasses.replace(sent)
                    fast(x, t - step, y)
            found[name] = sent.since(before).bytes
    return {name: _mean(each) for name, each in found.items()}


def _mean(number: float) -> float:
    value = torch.tensor(float(number))
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: KiB a step, and the part of the uncached step in brackets."""
    lines = ["| step | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in next(iter(columns.values())):
        cells = [f"{each[name] / 1024:,.1f} ({each[name] / each['uncached']:.3f})" for each in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-MoE", help="DiT-MoE for its small form, or a published size of it")
    parser.add_argument("--batch", type=whole_number(1), default=2, help="samples of each rank")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        family, sizes = families.PUBLISHED.get(arguments.model) or (families.FAMILIES[arguments.model], None)
        sizes = sizes or dataclasses.replace(family.reduced, side=16, depth=2, experts=8)
        whole = families.assemble(family, sizes)
        columns = {name: bytes_by_step(whole, layer, arguments.batch) for name, layer in LAYERS.items()}
        if dist.get_rank() == 0:
            about = environment(torch.device("cpu"), torch.float32) | {"ranks": dist.get_world_size()}
            print(", ".join(f"{key} {value}" for key, value in about.items()))
            print(f"{arguments.model}: {sizes}, {arguments.batch} samples a rank\n\n{table(columns)}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
