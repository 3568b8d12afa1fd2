"""What each process of test_expert_parallel.py runs. Rank 0 writes what all ranks found to a JSON file.

The reference is one process that holds all experts: the same model undivided, compiled with the same options, for the
samples of this rank.
"""

from __future__ import annotations

import datetime
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moeca_compile
from bench.exchange import counted
from examples import families
from examples.families.expert_parallel import CountedLayer, PaddedLayer, divided
from moeca_compile import backend
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.ranks import Ranks

SMALL = replace(families.FAMILIES["DiT-MoE"].reduced, depth=1, experts=8)
WHOLE = families.assemble(families.FAMILIES["DiT-MoE"], SMALL)
MOECA = {"recipe": "moeca", "budget": 1 / 16, "full_every": 3, "lowering": "eager", "disk_cache": False}
STEPS = 5
Found = dict[str, Any]


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="moeca", options={**MOECA, **options})


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Those of this rank."""
    return families.inputs_for(WHOLE, seed=10 * seed + dist.get_rank() + 1)


def sampled(model: Any, reference: Any = None, marked: bool = True) -> Found:
    """A generation: what each step sent, how far it is from the reference's, and the kinds of steps.

    The reference's own output leads to the next input, so an error shows at the step where it is made.
    """
    (x, t, y), sent_by_step, errors = inputs(), [], []
    handles = [moeca_compile.generation(each, steps=STEPS) for each in (model, reference)] if marked else []
    with counted() as sent, torch.no_grad():
        for step in range(STEPS):
            before = replace(sent)
            out = within(handles[:1], lambda x=x, step=step: model(x, t - 100 * step, y))
            sent_by_step.append(asdict(sent.since(before)))
            want = (
                out
                if reference is None
                else within(handles[1:], lambda x=x, step=step: reference(x, t - 100 * step, y))
            )
            errors.append(float((out - want).abs().max()))
            x = x - 0.02 * want
    report = moeca_compile.report(model)
    return {"sent": sent_by_step, "errors": errors, "steps": report.steps, "warnings": list(report.warnings)}


def within(handles: list[Any], call: Callable[[], Tensor]) -> Tensor:
    if not handles:
        return call()
    with handles[0]:
        return call()


# cases


def by_counts() -> Found:
    return sampled(compiled(divided(WHOLE, CountedLayer)), compiled(WHOLE))


def in_blocks() -> Found:
    return sampled(compiled(divided(WHOLE, PaddedLayer)), compiled(WHOLE))


def nothing_recomputed() -> Found:
    return sampled(compiled(divided(WHOLE, CountedLayer), budget=0.0), compiled(WHOLE, budget=0.0))


def whole_layers_cached() -> Found:
    own = {"backend": "moeca", "options": {"recipe": "fora", "full_every": 3, "lowering": "eager"}}
    torch._dynamo.reset()
    return sampled(torch.compile(divided(WHOLE, PaddedLayer), **own), torch.compile(WHOLE, **own))


def decided_by_the_data() -> Found:
    own = {"recipe": "teacache", "reuse_threshold": 0.3, "lowering": "eager"}
    torch._dynamo.reset()
    return sampled(torch.compile(divided(WHOLE, CountedLayer), backend="moeca", options=own))


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
        backend.sound_regions = lambda graph, regions, *_: regions.without(dict.fromkeys(regions.experts, "planted"))
    try:
        return sampled(compiled(divided(WHOLE, CountedLayer)), WHOLE, marked=False)
    finally:
        backend.sound_regions = sound


def one_has_no_numbers() -> Found:
    """On rank 0 the model's first input is not finite."""
    model = compiled(divided(WHOLE, CountedLayer))
    x, t, y = inputs()
    with torch.no_grad():
        model(x * (float("nan") if dist.get_rank() == 0 else 1.0), t, y)
    return sampled(model, WHOLE, marked=False)


def one_raises() -> Found:
    """On rank 0 a step fails. The model itself would exchange what the other rank does not: so the error is raised."""
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
    return {"most": ranks.most(number), "mean": ranks.mean(number), "alike": [ranks.alike(0), ranks.alike(number)]}


def cannot_be_compiled() -> Found:
    """Whatever fails before any step on all ranks: the model itself runs, with its exchange."""
    cached = backend._cached
    backend._cached = failing
    try:
        return sampled(compiled(divided(WHOLE, PaddedLayer)), WHOLE, marked=False)
    finally:
        backend._cached = cached


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


CASES = {
    2: (
        by_counts,
        in_blocks,
        nothing_recomputed,
        whole_layers_cached,
        decided_by_the_data,
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


def main(out: Path) -> None:
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
        out.write_text(json.dumps(every))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
