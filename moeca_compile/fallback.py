"""When the original model runs, whole or in part, in place of cached steps, and the warnings that say so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeca_compile import capture, tuned_file
from moeca_compile._torch_private import (
    calling_code,
    forget_code,
    graph_break,
    in_decorated_function,
    inductor,
    is_sharded,
    missing,
    outermost_module,
    subclass_among,
    subclass_weight,
)
from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CapturedGraph
from moeca_compile.notes import Notes
from moeca_compile.options import ConfigError
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.timestep import find_times_of_tokens
from moeca_compile.passes.rewrite.without_markers import markers
from moeca_compile.plan import Plan
from moeca_compile.runtime import scope
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.original import Original
from moeca_compile.runtime.record import Record
from moeca_compile.runtime.timesteps import NO_TIMESTEP

_log = logging.getLogger(__name__)

GRADIENTS = (
    "gradients are enabled. The original model runs and nothing is cached, so sampling is no faster. Call the model "
    "under torch.no_grad() or torch.inference_mode()"
)
TRAINING = (
    "the model is in training mode. The original model runs and nothing is cached, so sampling is no faster. Call "
    "model.eval() first"
)
MISSING = (
    "torch {0} has no {1}. The model runs as under plain torch.compile and nothing is cached, so sampling is no "
    "faster. Use a version of torch that docs/private-apis.md names"
)
SUBCLASS = (
    "{0} is a {1}, and values of tensor subclasses cannot be cached. The model runs as under plain torch.compile, so "
    "sampling is no faster. Quantize the model by modules of its own, or not at all"
)
SHARDED = (
    "the model is sharded over processes (by fully_shard, parallelize_module or another maker of DTensors), and its "
    "values cannot be cached then. It runs as under plain torch.compile, so sampling is no faster. Give each process "
    "the whole model and a part of the samples"
)
BREAK = (
    "{0}: the graph breaks here ({1}). The model is compiled in parts and nothing is cached across the break, so "
    "sampling is slower than it could be. If this is MoE dispatch, make it traceable as docs/extending/idiom.md says"
)
HOST_READ = (
    "{0}: the graph breaks here, because Python needs the value of a tensor ({1}). The model is compiled in parts "
    "and nothing is cached across the break, so sampling is slower than it could be. If the value depends on "
    "arguments alone (lengths of texts, a mask, positions), read it before the model is called and pass it as a "
    "number, or compute with the tensor and a mask (torch.where, masked_fill) in place of Python's if, for and "
    "slices. If this is MoE dispatch, make it traceable as docs/extending/idiom.md says"
)
_READS = ("Tensor.item()", "Tensor.tolist()", "Data dependent", "Data-dependent", "generic_jump TensorVariable")
"""What Dynamo's reasons contain where Python reads a tensor's value."""
NOTHING_FOUND = (
    "recipe {0!r} found nothing that it could cache: it needs {1}. The model runs uncached, so sampling is no "
    "faster. moeca_compile.report(model) says what was found"
)
WITHOUT_EXPERTS = ". For a model without experts, choose the recipe fora, stack or block"
TIMES_OF_TOKENS = (
    "no argument was found with one timestep for each sample, only {0}, with a number for each token. Steps are "
    "detected from one timestep for all tokens of a sample, so the model runs uncached, and sampling is no faster. "
    "If all its tokens have the same time, pass the timestep with the shape (batch,), or mark each call with "
    "moeca_compile.step(time)"
)
MODE = (
    "mode={0!r} has no effect with backend='moeca', which compiles every step by Inductor's default mode and records "
    "CUDA graphs by its own option cuda_graphs. Give options={{...}} in its place"
)
GIVEN_UP = (
    "Dynamo runs the code around parts of the model as plain Python, so the model is compiled in parts and nothing "
    "is cached. Most often another backend or training runs the same code between the calls of this model. Let it "
    "run before or after a whole generation, not between its steps"
)
OTHER_MODEL = (
    "the file was tuned for a model of {0}, and {1}. Take the file of this model, or make one by moeca_compile.tune"
)
OTHER_VERSIONS = (
    "{0} was tuned with {1}. Its options hold, but the speed-up may be another one: tune again to know it"
)
_MANY_STALE = 256
"""After this many calls of parts in place of the whole model, warn. A call of the model has some 3 for each block."""


def why_left(model: nn.Module | None) -> str | None:
    """Why a model as it is now is left to torch.compile, whoever calls it; None where it is not.

    A weight that is no plain tensor or sharded, a name that this torch lacks, or training mode.
    """
    if is_sharded(model):
        return SHARDED
    weight = subclass_weight(model)
    if weight is not None:
        return _of_subclass(*weight)
    if missing():
        return MISSING.format(torch.__version__, ", ".join(missing()))
    return TRAINING if model is not None and model.training else None


def why_original(gm: fx.GraphModule, inputs: Sequence[Any], record: Record) -> str | None:
    """Why a graph is left to torch.compile; None where it is not: its model, or a call of it with gradients."""
    reason, subclass = why_left(outermost_module()), subclass_among(gm, inputs)
    if reason is not None:
        return reason
    if subclass is not None:
        return _of_subclass(*subclass)
    # Capture is off while gradients are enabled, so graph breaks then say nothing about the model.
    wanted = (
        calling_code() or graph_break() or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    )
    if torch.is_grad_enabled():
        return GRADIENTS if wanted else None
    # MoE dispatch is often decorated with no_grad: in a call with gradients it is a graph of its own, without them.
    return GRADIENTS if GRADIENTS in record.notes.warnings and in_decorated_function() else None


def _of_subclass(name: str, value: Tensor) -> str:
    return SHARDED if is_sharded(value) else SUBCLASS.format(name, type(value).__name__)


def check_tuned(record: Record, model: nn.Module | None) -> None:
    """Raise ConfigError where options were tuned for a model of another structure; warn of other versions.

    Only a graph of the whole model says which model that is.
    """
    tuned = record.config.tuned
    if tuned is None or model is None or record.partial or record.breaks:
        return
    found = tuned_file.fingerprint(model)
    if found != tuned.model:
        here = f"this one has {found}" + (" of other shapes" if found[:2] == tuned.model[:2] else "")
        raise ConfigError("tuned", tuned.path, OTHER_MODEL.format(tuned.model, here))
    now = tuned_file.versions()
    others = [f"{name} {then} (now {now[name]})" for name, then in tuned.versions if now.get(name, then) != then]
    if others:
        record.notes.warn(OTHER_VERSIONS.format(tuned.path, " and ".join(others)))


def compile_original(
    gm: fx.GraphModule, inputs: Sequence[Any], record: Record, original: Original
) -> Callable[..., Any]:
    """The graph as plain torch.compile compiles it, or not compiled at all where `lowering` is "eager"."""
    record.untouched += 1
    if markers(gm.graph):  # only `original` knows what to make of them
        return original
    if record.config.lowering == "eager":
        return gm.forward
    return inductor(gm, list(inputs))


def uncached_without_timestep(
    plan: Plan, captured: CapturedGraph, graph: fx.Graph, config: MoecaConfig, notes: Notes
) -> Plan:
    """The plan, without its caches where nothing says the time. Warns where the model then runs uncached."""
    if not config.policy.caches:
        return plan
    if not plan.replacements:
        # A graph break is warned of, and the report has the reason for each region that was skipped.
        if not captured.in_parts and not plan.regions.skipped:
            advice = "" if config.policy.applies(plan.regions) else WITHOUT_EXPERTS
            notes.warn(NOTHING_FOUND.format(config.recipe, config.policy.needs) + advice)
        return plan
    if plan.regions.timesteps:
        return plan
    if captured.partial:  # the warning about the graph break explains it already
        return replace(plan, replacements=(), capacities=(0,), probe=None)
    if scope.current_time() is None:
        times = find_times_of_tokens(captured.argument_nodes(graph))
        shapes = " and ".join(f"{node.name.removeprefix('l_').rstrip('_')} {tuple(shape_of(node))}" for node in times)
        notes.warn(TIMES_OF_TOKENS.format(shapes) if times else NO_TIMESTEP)
        return replace(plan, replacements=(), capacities=(0,), probe=None, untimed=True)
    return plan


def note_breaks(record: Record) -> None:
    """Record graph breaks, and whether this graph is a part of the model whose callers run as plain Python.

    Once a loop in a function breaks the graph, Dynamo never compiles that function again, for any backend or mode.
    Plain torch.compile, calls with gradients and calls in training mode all break at MoE dispatch. So make Dynamo try
    each caller once more. Where it then captures the whole model, the engines of the parts are dropped.
    """
    broken, callers = graph_break(), calling_code()
    record.partial = bool(callers)
    if broken is not None:
        record.breaks.append(broken)
        refused = {refusal.where.rpartition(":")[0] for refusal in capture.refusals(outermost_module())}
        if broken[0].rpartition(":")[0] not in refused:  # the warning about that dispatch explains it already
            read = any(words in broken[1] for words in _READS)
            record.notes.warn((HOST_READ if read else BREAK).format(*broken))
    elif not record.partial:
        record.engines = [engine for engine in record.engines if not engine.partial]
        record.untouched, record.breaks, record.stale_calls = 0, [], 0
    for code in callers:
        if id(code) not in record.tried_again:
            record.tried_again[id(code)] = code  # held, so that no other code gets its id
            forget_code(code)


def noticing_parts(engine: Engine, record: Record) -> Callable[..., Any]:
    """The engine of a part of a model, which notices when it is called although the model itself breaks no graph.

    Then Dynamo gave the model up: another backend, training or another model of the class compiled the same code
    meanwhile. So make it look again. Where that other user comes back before every call it is of no use, and is done
    ever more seldom.
    """

    def call(*inputs: Any) -> Any:
        if not record.breaks:
            record.stale_calls += 1
            if record.stale_calls.bit_count() == 1:  # 1, 2, 4, 8, ...
                for code in record.tried_again.values():
                    forget_code(code)
            if record.stale_calls == _MANY_STALE:
                record.notes.warn(GIVEN_UP)
        return engine(*inputs)

    return call


def worth_rewriting(gm: fx.GraphModule) -> bool:
    """Whether the graph contains an MoE layer or an attention."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return bool(markers(gm.graph)) or any(node.target is attention for node in gm.graph.nodes)
