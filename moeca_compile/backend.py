"""`torch.compile(model, backend="moeca")`: the pipeline.

    capture -> export -> normalize -> match -> plan -> rewrite -> lower -> validate -> run -> report

Capture happens while Dynamo traces (capture/). What follows happens in `runtime.specialization` for each set of
input shapes, in this order: to_functional_aten, collapse_views, match_regions, plan_step, and for each kind of
step when it is first needed: step_function (rewrite), Program.lower, Validator.check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile import capture
from moeca_compile._torch_private import (
    calling_code,
    forget_code,
    graph_break,
    in_decorated_function,
    is_module_state,
    missing,
    outermost_module,
    root_module,
    traced_wrapper,
)
from moeca_compile.config import MoecaConfig
from moeca_compile.ops.markers import MARKERS
from moeca_compile.passes.normalize.scalar_inputs_to_tensors import scalar_inputs_to_tensors
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.record import Record, record_for

GRADIENTS = (
    "gradients are enabled, so the original model runs and nothing is cached: call it under torch.no_grad() or "
    "torch.inference_mode() to switch caching on"
)
BREAK = (
    "{0}: the graph breaks here ({1}): the model is compiled in parts, as torch.compile would, and nothing is cached "
    "across the break. If this is MoE dispatch, docs/adding-an-idiom.md says how to teach moeca_compile to trace it"
)
MISSING = (
    "torch {0} has no {1}, so the model runs as under plain torch.compile and nothing is cached: use a "
    "version of torch that docs/private-apis.md names"
)
TRAINING = "the model is in training mode, so the original runs and nothing is cached: call model.eval() first"


def moeca_backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend function that torch.compile calls with each graph that Dynamo captured.

    Args:
        gm, inputs: the graph and example inputs (parameters, buffers and arguments).
        options: fields of MoecaConfig. Raises ConfigError for a wrong name or value.
    """
    config = MoecaConfig.from_options(options)
    record = record_for(traced_wrapper(), root_module(), config)
    reason = _why_original(inputs, record)
    if reason is not None:
        record.warn(reason)
        return _as_torch_compile_would(gm, inputs, record)
    _note_breaks(record)
    if not _worth_rewriting(gm):
        return _as_torch_compile_would(gm, inputs, record)
    user_inputs = [not is_module_state(node) for node in gm.graph.nodes if node.op == "placeholder"]
    numbers = scalar_inputs_to_tensors(gm, inputs)
    engine = Engine(gm, inputs, user_inputs, numbers, config, record)
    # Dynamo traces anew when, say, inputs become inference tensors; equal graphs go on with the same caches.
    known = next((other for other in record.engines if other.same_graph(engine)), None)
    if known is not None:
        return known
    record.engines.append(engine)
    return engine


moeca_backend._moeca_backend = True  # type: ignore[attr-defined]
capture.install()


def _note_breaks(record: Record) -> None:
    """Note where the graph breaks, and whether it is a part of the model whose callers run as plain Python.

    Dynamo gives up a function for good, whatever backend or mode it was compiled for, where a loop in it breaks
    the graph: plain torch.compile does so at MoE dispatch, and so do calls with gradients or in training mode.
    So it is told once to look at the callers again, and then drops the parts that it did not need.
    """
    broken, callers = graph_break(), set(calling_code())
    record.partial = bool(callers)
    if broken is not None:
        record.breaks.append(broken)
        told = {refusal.where.rpartition(":")[0] for refusal in capture.refusals()}
        if broken[0].rpartition(":")[0] not in told:  # else it is most likely what was warned of there
            record.warn(BREAK.format(*broken))
    elif not record.partial:
        record.engines = [engine for engine in record.engines if not engine.partial]
        record.untouched, record.breaks = 0, []
    for code in callers - record.tried_again:
        record.tried_again.add(code)
        forget_code(code)


def _why_original(inputs: Sequence[Any], record: Record) -> str | None:
    module, callers = outermost_module(), calling_code()
    if missing():
        return MISSING.format(torch.__version__, ", ".join(missing()))
    if module is not None and module.training:
        return TRAINING
    # Capture is off while gradients are on, so a graph that comes in parts then says nothing of the model.
    wanted = callers or graph_break() or any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
    if torch.is_grad_enabled():
        return GRADIENTS if wanted else None
    # Dispatch is often decorated with no_grad, and traced as a part of a call with gradients.
    return GRADIENTS if GRADIENTS in record.warnings and in_decorated_function() else None


def _worth_rewriting(gm: fx.GraphModule) -> bool:
    """Whether the graph holds an MoE layer or an attention at all."""
    wanted = (
        *MARKERS,
        *(marker.overloadpacket for marker in MARKERS),
        torch.nn.functional.scaled_dot_product_attention,
    )
    return any(node.target in wanted for node in gm.graph.nodes)


def _as_torch_compile_would(gm: fx.GraphModule, inputs: Sequence[Any], record: Record) -> Callable[..., Any]:
    record.untouched += 1
    return torch._dynamo.lookup_backend("inductor")(gm, list(inputs))
