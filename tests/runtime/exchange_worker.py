"""What each process of test_expert_parallel.py runs. Rank 0 writes what all ranks found to a JSON file.

The reference is one process that holds all experts: the same model undivided, compiled with the same options, on the
samples of this rank. Inputs come from the reference's outputs, so an error shows at the step where it is made.
"""

from __future__ import annotations

import datetime
import json
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moeca_compile
from bench.exchange import counted
from examples import families
from examples.families.expert_parallel import CountedLayer, DividedLayer, PaddedLayer, divided
from moeca_compile import backend
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.ranks import Ranks
from tests.capture.exchange_layers import Gated

SMALL = replace(families.FAMILIES["DiT-MoE"].reduced, depth=1, experts=8)
WHOLE = families.assemble(families.FAMILIES["DiT-MoE"], SMALL)
STEPS = 5
Found = dict[str, Any]
Path = list[tuple[Tensor, Tensor]]
"""The input and the output of each step."""


def compiled(model: Any, recipe: str = "moeca", budget: float | None = 1 / 16) -> Any:
    torch._dynamo.reset()
    options = {"recipe": recipe, "full_every": 3, "lowering": "eager", "disk_cache": False}
    return torch.compile(model, backend="moeca", options=options | ({} if budget is None else {"budget": budget}))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Those of this rank."""
    return families.inputs_for(WHOLE, seed=10 * seed + dist.get_rank() + 1)


def path_of(model: Any, marked: bool = True) -> Path:
    """The inputs and outputs of a generation of one process that holds all experts."""
    (x, t, y), path = inputs(), []
    handle = handle_for(model, marked)
    with torch.no_grad():
        for step in range(STEPS):
            with handle:
                out = model(x, t - 100 * step, y)
            path.append((x, out))
            x = x - 0.02 * out
    return path


def sampled(model: Any, path: Path, marked: bool = True) -> Found:
    """A generation on the inputs of a path: what each step sent, how far it is from the path, and the report."""
    (_, t, y), sent_by_step, errors = inputs(), [], []
    handle = handle_for(model, marked)
    with counted() as sent, torch.no_grad():
        for step, (x, want) in enumerate(path):
            before = replace(sent)
            with handle:
                out = model(x, t - 100 * step, y)
            sent_by_step.append(asdict(sent.since(before)))
            errors.append(float((out - want).abs().max()))
    report = moeca_compile.report(model)
    return {"sent": sent_by_step, "errors": errors, "steps": report.steps, "warnings": list(report.warnings)}


def handle_for(model: Any, marked: bool) -> AbstractContextManager[Any]:
    return moeca_compile.generation(model, steps=STEPS) if marked else nullcontext()


@cache
def one_process(recipe: str = "moeca", budget: float | None = 1 / 16) -> tuple[Path, float]:
    """The path of one process, and its speedup by FLOPs."""
    model = compiled(WHOLE, recipe, budget)
    return path_of(model), moeca_compile.report(model).flops.speedup


def as_one_process(layer: type[DividedLayer], recipe: str = "moeca", budget: float | None = 1 / 16) -> Found:
    model, (path, speedup) = compiled(divided(WHOLE, layer), recipe, budget), one_process(recipe, budget)
    found = sampled(model, path)
    return found | {"speedups": [moeca_compile.report(model).flops.speedup, speedup]}


# cases


def by_counts() -> Found:
    return as_one_process(CountedLayer)


def in_blocks() -> Found:
    return as_one_process(PaddedLayer)


def nothing_recomputed() -> Found:
    return as_one_process(CountedLayer, budget=0.0)


def with_places_that_run_out() -> Found:
    """DeepSpeed's form, of which a token's place depends on those before it; the reference has a group of its own."""
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    path = path_of(compiled(divided(WHOLE, Gated, own)))
    with torch.no_grad():
        uncached = divided(WHOLE, Gated)(*inputs())
    found = sampled(compiled(divided(WHOLE, Gated)), path)
    return found | {"uncached": float((uncached - path[0][1]).abs().max())}


def whole_layers_cached() -> Found:
    return as_one_process(PaddedLayer, "fora", None)


def decided_by_the_data() -> Found:
    own = {"recipe": "teacache", "reuse_threshold": 0.3, "lowering": "eager"}
    torch._dynamo.reset()
    model = torch.compile(divided(WHOLE, CountedLayer), backend="moeca", options=own)
    return sampled(model, path_of(WHOLE, False))


def controlled_by_the_error() -> Found:
    """The full steps of the ranks together, and those that each would have by itself: their errors differ."""
    together, alone = (full_steps_of(model, max_error=0.15) for model in (divided(WHOLE, CountedLayer), WHOLE))
    return {"together": together, "alone": alone}


def told_otherwise() -> Found:
    """On rank 0 the sampler is said to be stochastic, on the others to be deterministic."""
    return {"full": full_steps_of(divided(WHOLE, CountedLayer), told=dist.get_rank() > 0, max_error=1e-4)}


def full_steps_of(model: Any, max_error: float, told: bool = True) -> list[int]:
    """Those of a generation of 16 steps, which go farther on the other ranks than on the first."""
    torch._dynamo.reset()
    own = {"recipe": "auto", "full_every": 3, "max_error": max_error, "lowering": "eager", "disk_cache": False}
    fast = torch.compile(model, backend="moeca", options=own)
    handle, (x, t, y), counts = moeca_compile.generation(fast, steps=16, deterministic=told), inputs(), [0]
    with torch.no_grad():
        for step in range(16):
            with handle:
                out = fast(x, t - 20 * step, y)
            counts.append(moeca_compile.report(fast).steps["full"])
            x = x - (0.02 + 0.2 * dist.get_rank()) * out
    return [step for step in range(16) if counts[step + 1] > counts[step]]


def uneven_data() -> Found:
    """On rank 0 alone the picture jumps at step 3, both passes of a step have equal labels, and thresholds decide."""
    model = compiled(divided(WHOLE, CountedLayer), budget=None)
    x, t, y = inputs()
    other = y if dist.get_rank() == 0 else (y + 1) % 10
    with torch.no_grad():
        for _ in range(2):
            for step in range(STEPS):
                given = torch.randn_like(x) if step == 3 and dist.get_rank() == 0 else x
                model(given, t - 100 * step, y)
                model(given, t - 100 * step, other)
    report = moeca_compile.report(model)
    return {"steps": report.steps, "warnings": list(report.warnings)}


def one_fails_validation() -> Found:
    """On the last rank no region passes."""
    sound = backend.sound_regions
    if dist.get_rank() == dist.get_world_size() - 1:
        backend.sound_regions = lambda _, regions, *__: regions.without(dict.fromkeys(regions.experts, "planted"))
    try:
        return sampled(compiled(divided(WHOLE, CountedLayer)), path_of(WHOLE, False), marked=False)
    finally:
        backend.sound_regions = sound


def one_has_no_numbers() -> Found:
    """On rank 0 the model's first input is not finite."""
    model = compiled(divided(WHOLE, CountedLayer))
    x, t, y = inputs()
    with torch.no_grad():
        model(x * (float("nan") if dist.get_rank() == 0 else 1.0), t, y)
    return sampled(model, path_of(WHOLE, False), marked=False)


def one_raises() -> Found:
    """On rank 0 a step fails. Since the model itself would exchange what the other does not, that is raised."""
    model, (x, t, y) = compiled(divided(WHOLE, CountedLayer)), inputs()
    enter, raised = StepLoop.enter, ""
    with torch.no_grad():
        model(x, t, y)
        if dist.get_rank() == 0:
            StepLoop.enter = failing
            try:
                model(x, t - 100, y)
            except RuntimeError as error:
                raised = str(error)
            StepLoop.enter = enter
    return {"raised": raised}


def agreed() -> Found:
    """What the ranks make of numbers and forms that differ."""
    ranks = Ranks(("0",), torch.device("cpu"))
    number = float(dist.get_rank())
    told = [(True, True), (True, None), (None, False), (False, True), (False, False)]
    return {
        "most": ranks.most(number),
        "mean": ranks.mean(number),
        "alike": [ranks.alike(0), ranks.alike(number)],
        "all say": [ranks.all_say(each[dist.get_rank()]) for each in told],
    }


def cannot_be_compiled() -> Found:
    """Whatever fails before any step on all ranks: the model itself runs, with its exchange."""
    cached = backend._cached
    backend._cached = failing
    try:
        return sampled(compiled(divided(WHOLE, PaddedLayer)), path_of(WHOLE, False), marked=False)
    finally:
        backend._cached = cached


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


CASES = {
    2: (
        by_counts,
        in_blocks,
        nothing_recomputed,
        with_places_that_run_out,
        whole_layers_cached,
        decided_by_the_data,
        controlled_by_the_error,
        told_otherwise,
        uneven_data,
        one_fails_validation,
        one_has_no_numbers,
        one_raises,
        agreed,
        cannot_be_compiled,
    ),
    4: (by_counts, in_blocks, nothing_recomputed),
}


def uncached(layer: Any) -> Found:
    """What the model sends in eager mode."""
    model = divided(WHOLE, layer)
    with counted() as sent, torch.no_grad():
        model(*inputs())
    return asdict(sent)


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found: dict[str, Any] = {"uncached": {each.__name__: uncached(each) for each in (CountedLayer, PaddedLayer)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES[dist.get_world_size()]:
            found[case.__name__] = case()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(every, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
