"""What each process of test_sharded.py runs: the toy model, sharded in several ways, compiled and called.

Writes, for each way, what was found: a JSON file from rank 0.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import moeca_compile
from tests.models import SMALL, make_inputs, make_model

OPTIONS = {"recipe": "fora", "full_every": 2, "lowering": "eager"}
STEPS = 4


def block_by_block(model: Any, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def kept_whole_once_gathered(model: Any, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def at_once(model: Any, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    parallelize_module(model.blocks[0].mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


WAYS = (block_by_block, kept_whole_once_gathered, at_once, tensor_parallel)


def sample(model: Callable[..., Tensor]) -> Tensor:
    x, labels = make_inputs(make_model(SMALL))
    with torch.no_grad():
        for step in range(STEPS):
            x = x - model(x, torch.full((len(x),), 1 - step / STEPS), labels) / STEPS
    return x


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="moeca", options=OPTIONS)


def found(shard: Callable[[Any, DeviceMesh], None], mesh: DeviceMesh) -> dict[str, Any]:
    """The error to the whole model, and what was said."""
    torch._dynamo.reset()
    sharded = make_model(SMALL)
    shard(sharded, mesh)
    fast = compiled(sharded)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sample(fast)  # with compilation
        got = sample(fast)
    again = make_model(SMALL)
    shard(again, mesh)
    another = compiled(again)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(another)
    return {
        "another": moeca_compile.report(another).warnings,
        "error": float((got - sample(make_model(SMALL))).abs().max()),
        "warnings": [str(each.message) for each in said if str(each.message).startswith("moeca")],
        "report": moeca_compile.report(fast).warnings,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    every = {way.__name__: found(way, mesh) for way in WAYS}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(every))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
