"""Floating-point operations of a traced step, counted op by op with torch's own counter.

An op's count depends on its shapes alone, except where the number of expert branches depends on the data. Such ops
are listed with their FLOPs per branch, to be multiplied by the branches that a step really ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile._torch_private import fake_mode_of
from moeca_compile.ops import attention, bodies, fixed_k, linear, variable_k  # noqa: F401  (define the ops below)
from moeca_compile.ops.body_plan import flops_per_row
from moeca_compile.passes.analysis.costs import node_flops
from moeca_compile.passes.analysis.graph import is_pointwise

moeca = torch.ops.moeca
SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Ragged:
    """An op whose number of branches depends on the data. `refreshes`: it runs recomputed branches only."""

    per_branch: int
    refreshes: bool


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step: those fixed by its shapes, and the ops that depend on the data, in graph order."""

    fixed: int
    ragged: tuple[Ragged, ...] = ()

    def total(self, refreshed: Sequence[float] = (), routed: Sequence[float] = ()) -> float:
        """FLOPs with these branches: recomputed ones of each refreshing op, all of each layer with variable k."""
        counts = {True: iter(refreshed), False: iter(routed)}
        return self.fixed + sum(op.per_branch * next(counts[op.refreshes], 0.0) for op in self.ragged)


def step_flops(graph: fx.Graph) -> StepFlops:
    """Count the ops of a graph that has fake values on its nodes."""
    fixed, ragged = 0, []
    known: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_pointwise(node.target):
            continue
        if node.target in _RAGGED:
            ragged.append(Ragged(_per_branch(node), _RAGGED[node.target]))
        elif node.target in _FIXED_K:
            fixed += _per_branch(node) * _value(_given(node)["index"]).numel()
        elif node.target is SDPA:  # torch's counter sees the kernel that it picks, and does not know them all
            fixed += node_flops(node)
        else:
            form = node.target, repr(fx.map_arg((node.args, node.kwargs), _form))
            if form not in known:
                known[form] = _counted(node)
            fixed += known[form]
    return StepFlops(fixed, tuple(ragged))


_FIXED_K = (moeca.fixed_k_outputs.default, moeca.fixed_k_outputs_into.default)
_RAGGED = {
    moeca.variable_k_outputs.default: False,
    moeca.variable_k_outputs_into.default: False,
    moeca.refresh_fixed_k.default: True,
    moeca.refresh_variable_k.default: True,
}


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * torch.Size(out_shape).numel() * weight[1]


def _attention_flops(
    keys: Sequence[int], values: Sequence[int], query: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """Chosen queries (B, H, C, d) against all cached keys (B, N, H, d)."""
    return 2 * torch.Size(query[:-1]).numel() * keys[1] * (query[-1] + out_shape[-1])


_FORMULAS: Mapping[Any, Callable[..., int]] = {moeca.linear: _linear_flops, moeca.attend_rows: _attention_flops}


def _counted(node: fx.Node) -> int:
    """FLOPs of an op on the fake tensors that it is given."""
    args, kwargs = _values((node.args, node.kwargs))
    counter = FlopCounterMode(display=False, custom_mapping=dict(_FORMULAS))
    given = map(_value, node.all_input_nodes)
    with torch.no_grad(), fake_mode_of(given), counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return int(counter.get_total_flops())


def _per_branch(node: fx.Node) -> int:
    """FLOPs of one row through the expert body that an op runs."""
    given = _values(_given(node))
    rows, parameters = given["rows"], given["parameters"]
    experts = given["experts"] if "experts" in given else given["routed"].shape[-1]
    own = bodies.held_here(given["body"], experts)
    return flops_per_row(given["body"], rows, parameters[: len(parameters) // own])


def _given(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of an op of ours, by name."""
    normalized = node.normalized_arguments(torch.nn.Module(), normalize_to_only_use_kwargs=True)
    assert normalized is not None, "an op of ours has one schema"
    given: Mapping[str, Any] = normalized.kwargs
    return given


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, _value)


def _value(node: Any) -> Any:
    return getattr(node.graph.owning_module, str(node.target)) if node.op == "get_attr" else node.meta["val"]


def _form(node: fx.Node) -> str:
    """The properties of a value that an op's count depends on."""
    value = _value(node)
    return f"{tuple(value.shape)}:{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
