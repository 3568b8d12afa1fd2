"""Calls of a pipeline that never reach the compiled denoiser, since Dynamo runs its code as plain Python.

Dynamo does so for good once it has compiled a function as often as it may, and tells no backend. Functions are
shared: by all models of a class, and the decorator of a forward by models of many classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import CodeType
from typing import Any

from torch import nn

from moeca_compile._torch_private import dynamo_is_running, forget_code
from moeca_compile.pipelines.image import scheduler_of
from moeca_compile.reporting.found import record_of
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.record import Record

IDLE = (
    "component {0!r} of {1} ran as plain Python in this call of the pipeline, uncached. Most often Dynamo has "
    "compiled its code as often as it may (torch.compiler.config.recompile_limit, now {2}), as after many adapters "
    "were loaded, scaled and deleted. The next call compiles it anew. To have none run so, raise that number, or let "
    "adapters take each other's place (pipe.enable_lora_hotswap)"
)


Taken = list[list[tuple[Engine, int]]]
"""For each denoiser its graphs' engines, with the steps that they have run."""


def steps_taken(denoisers: Mapping[str, nn.Module]) -> Taken:
    """How many steps the graphs of these denoisers have run so far."""
    return [_steps(record_of(module)) for module in denoisers.values()]


def look_for_idle(pipe: Any, denoisers: Mapping[str, nn.Module], before: Taken) -> None:
    """Where the scheduler has stepped in this call of the pipeline and no denoiser has: warn, and let Dynamo forget
    that it has given their code up."""
    if not getattr(scheduler_of(pipe), "step_index", None) or steps_taken(denoisers) != before:
        return
    for name, module in denoisers.items():
        record = record_of(module)
        if record is not None and _says_why(record):
            continue
        config: Any = import_module("torch.compiler.config")
        text = IDLE.format(name, type(pipe).__name__, config.recompile_limit)
        if record is None:
            warnings.warn(f"moeca: {text}", stacklevel=4)
        else:
            record.notes.warn(text)
        for code in () if dynamo_is_running() else _codes(module):
            forget_code(code)


def _codes(module: nn.Module) -> Iterator[CodeType]:
    """The code of the forward, and of what it is decorated with."""
    function: Any = type(module).forward
    while function is not None:
        yield function.__code__
        function = getattr(function, "__wrapped__", None)


def _steps(record: Record | None) -> list[tuple[Engine, int]]:
    engines = record.engines if record is not None else ()
    return [(engine, sum(each.tallies.steps for each in engine.counted())) for engine in engines]


def _says_why(record: Record) -> bool:
    """Whether the report has the reason already, or nothing is wanted."""
    failed = any(engine.failed for engine in record.engines)
    return bool(record.untouched or record.breaks or failed or not record.config.policy.caches)
