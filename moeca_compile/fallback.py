"""Where the original runs, whole or in parts, in place of steps of ours, and what the user is told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile import capture
from moeca_compile._torch_private import (
    calling_code,
    forget_code,
    graph_break,
    in_decorated_function,
    missing,
    outermost_module,
)
from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CapturedGraph
from moeca_compile.notes import Notes
from moeca_compile.ops.markers import MARKERS
from moeca_compile.plan import Plan
from moeca_compile.runtime.record import Record

_log = logging.getLogger(__name__)

GRADIENTS = (
    "gradients are enabled, so nothing is cached and the original model runs: call it under torch.no_grad() or "
    "torch.inference_mode()"
)
TRAINING = "the model is in training mode, so nothing is cached and the original runs: call model.eval() first"
MISSING = (
    "torch {0} has no {1}, so nothing is cached and the model runs as under plain torch.compile: use a version of "
    "torch that docs/private-apis.md names"
)
BREAK = (
    "{0}: the graph breaks here ({1}), so the model is compiled in parts, as torch.compile would, and nothing is "
    "cached across the break. If this is MoE dispatch, docs/extending/idiom.md says how to make it traceable"
)
NOTHING_FOUND = (
    "recipe {0!r} found nothing that it could cache, so the model runs uncached: it needs {1}. The fora, stack and "
    "block recipes cache models without experts too"
)
NO_TIMESTEP = (
    "no timestep was found among the model's inputs, so steps and generations cannot be told apart and the model "
    "runs uncached. Pass the timestep as a tensor argument that reaches a sinusoidal embedding"
)


def runs_as_it_was(gm: fx.GraphModule, inputs: Sequence[Any], record: Record) -> bool:
    """Whether a graph is left to torch.compile: under autograd, in training, or without anything to rewrite."""
    reason = _why_original(inputs, record)
    if reason is not None:
        _log.debug("a graph of %d nodes is left to torch.compile: %s", len(gm.graph.nodes), reason)
        record.notes.warn(reason)
        return True
    _note_breaks(record)
    return not _worth_rewriting(gm)


def as_torch_compile_would(gm: fx.GraphModule, inputs: Sequence[Any], record: Record) -> Callable[..., Any]:
    record.untouched += 1
    if record.config.lowering == "eager":
        return gm.forward
    return torch._dynamo.lookup_backend("inductor")(gm, list(inputs))


def uncached_where_idle(plan: Plan, captured: CapturedGraph, config: MoecaConfig, notes: Notes) -> Plan:
    """The plan; without caches where no timestep tells steps apart. A model that runs uncached is warned of."""
    if config.policy.declares_nothing:
        return plan
    if not plan.replacements:
        if not plan.regions.skipped and not captured.in_parts:  # else that is warned of
            notes.warn(NOTHING_FOUND.format(config.recipe, config.policy.needs))
        return plan
    if plan.regions.timesteps:
        return plan
    if not captured.partial:  # else the break that made it a part is warned of
        notes.warn(NO_TIMESTEP)
    return replace(plan, replacements=(), capacities=(0,))


def _why_original(inputs: Sequence[Any], record: Record) -> str | None:
    if missing():
        return MISSING.format(torch.__version__, ", ".join(missing()))
    module, callers = outermost_module(), calling_code()
    if module is not None and module.training:
        return TRAINING
    # Capture is off while gradients are on, so a graph that comes in parts then says nothing of the model.
    wanted = callers or graph_break() or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    if torch.is_grad_enabled():
        return GRADIENTS if wanted else None
    # Dispatch is often decorated with no_grad, and traced as a part of a call with gradients.
    return GRADIENTS if GRADIENTS in record.notes.warnings and in_decorated_function() else None


def _note_breaks(record: Record) -> None:
    """Note where the graph breaks, and whether it is a part of the model whose callers run as plain Python.

    Dynamo gives up a function for good, whatever backend or mode it was compiled for, where a loop in it breaks
    the graph: plain torch.compile does so at MoE dispatch, and so do calls with gradients or in training mode.
    So it is made to look at the callers again, once, and then drops the parts that it did not need.
    """
    broken, callers = graph_break(), set(calling_code())
    record.partial = bool(callers)
    if broken is not None:
        record.breaks.append(broken)
        refused = {refusal.where.rpartition(":")[0] for refusal in capture.refusals()}
        if broken[0].rpartition(":")[0] not in refused:  # else it is most likely what was warned of there
            record.notes.warn(BREAK.format(*broken))
    elif not record.partial:
        record.engines = [engine for engine in record.engines if not engine.partial]
        record.untouched, record.breaks = 0, []
    for code in callers - record.tried_again:
        record.tried_again.add(code)
        forget_code(code)


def _worth_rewriting(gm: fx.GraphModule) -> bool:
    """Whether the graph holds an MoE layer or an attention at all."""
    wanted = (
        *MARKERS,
        *(marker.overloadpacket for marker in MARKERS),
        torch.nn.functional.scaled_dot_product_attention,
    )
    return any(node.target in wanted for node in gm.graph.nodes)
