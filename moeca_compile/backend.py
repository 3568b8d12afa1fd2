"""`torch.compile(model, backend="moeca")`: the pipeline.

    capture -> export -> normalise -> match -> plan -> rewrite -> lower -> validate -> run -> report

Capture happens while Dynamo traces (capture/). What follows happens in `runtime.specialisation` for each set of
input shapes, in this order: to_functional_aten, collapse_views, match_regions, plan_step, and for each kind of
step when it is first needed: step_function (rewrite), Program.lower, Validator.check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import moeca_compile.ops.attention
import moeca_compile.ops.branches
import moeca_compile.ops.markers  # noqa: F401
from moeca_compile import capture
from moeca_compile._torch_private import (
    calling_code,
    forget_code,
    graph_break,
    is_module_state,
    root_module,
    traced_wrapper,
)
from moeca_compile.config import MoecaConfig
from moeca_compile.passes.scalar_inputs import scalar_inputs_to_tensors
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.record import Record, record_for

GRADIENTS = (
    "gradients are enabled, so the original model runs and nothing is cached: call it under torch.no_grad() or "
    "torch.inference_mode() to switch caching on"
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
    broken = graph_break()
    if broken is not None:
        record.breaks.append(broken)
    reason = _why_original(inputs)
    if reason is not None:
        record.warn(reason)
        return _as_torch_compile_would(gm, inputs, record)
    if not _worth_rewriting(gm):
        return _as_torch_compile_would(gm, inputs, record)
    if _gave_up_callers(record):
        # This call alone sees its graphs one by one; the next one is traced from the model's beginning.
        config, record = MoecaConfig(recipe="none", validate=False), Record(config)
    user_inputs = [not is_module_state(node) for node in gm.graph.nodes if node.op == "placeholder"]
    numbers = scalar_inputs_to_tensors(gm, inputs)
    engine = Engine(gm, user_inputs, numbers, config, record)
    # Dynamo traces anew when, say, inputs become inference tensors; equal graphs go on with the same caches.
    known = next((other for other in record.engines if other.same_graph(engine)), None)
    if known is not None:
        return known
    record.engines.append(engine)
    return engine


moeca_backend._moeca_backend = True  # type: ignore[attr-defined]
capture.install()


def _gave_up_callers(record: Record) -> bool:
    """Whether Dynamo gave up this graph's callers in calls for which nothing is captured, and if so undo it.

    With gradients or in training mode MoE dispatch breaks the graph; where that is in a loop over blocks, Dynamo
    runs the function around it as plain Python from then on, whatever the mode.
    """
    if not {GRADIENTS, TRAINING} & set(record.warnings):
        return False
    callers = set(calling_code()) - record.tried_again
    record.tried_again |= callers
    for code in callers:
        forget_code(code)
    return bool(callers)


def _why_original(inputs: Sequence[Any]) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        return GRADIENTS
    module = root_module()
    return TRAINING if module is not None and module.training else None


def _worth_rewriting(gm: fx.GraphModule) -> bool:
    """Whether the graph holds an MoE layer or an attention at all."""
    wanted = (
        torch.ops.moeca.experts,
        torch.ops.moeca.experts.default,
        torch.nn.functional.scaled_dot_product_attention,
    )
    return any(node.target in wanted for node in gm.graph.nodes)


def _as_torch_compile_would(gm: fx.GraphModule, inputs: Sequence[Any], record: Record) -> Callable[..., Any]:
    record.untouched += 1
    return torch._dynamo.lookup_backend("inductor")(gm, list(inputs))
