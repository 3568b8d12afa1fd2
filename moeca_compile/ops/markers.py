"""Marker ops: capture writes them into the graph in place of a MoE layer's dispatch, and later passes replace them.

    expert_rows(x) -> rows                                       the rows that enter an expert's body
    experts_fixed_k(x, index, weight, body_out, params, num_experts) -> out
                                      out[t] = sum_j weight[t, j] * expert_index[t, j](x[t])

    experts_variable_k(x, routed, weight, body_out, params, num_experts, branches, coupled) -> out
                                      out[t] = sum_e routed[t, e] * weight[t, e] * expert_e(x[t])

`experts_fixed_k` is for layers where every token has k experts, `experts_variable_k` for all others (expert choice,
dynamic capacity). `branches` is the number of routed (token, expert) pairs if it follows from the shapes, else 0.
`coupled` says whether the routing of a sample depends on the other samples of the batch.

With a `group`, the name of a process group, its ranks hold `num_experts` each, and `params` are those of this rank
(ops/exchange.py, which says what `places` are). Ids are those of all ranks' experts, and maps have a column for each.

Between `expert_rows` and the marker, the graph has the body of expert 0, run on every row. `params` has the
parameters of all experts, P each: the body of expert e is that of expert 0 with `params[e * P : (e + 1) * P]` in
place of `params[:P]`. So the graph has one body a layer, not one an expert.

Shapes: x (T, D); index and weight (T, k) for fixed k; routed and weight (T, E) for variable k; body_out and the
result (T, width). The ops are functional and have no autograd formula: capture emits them only with gradients off.
The two `experts` ops have only a schema and a fake. They raise NotImplementedError when run, since a pass has to
replace them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "moeca"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("expert_rows(Tensor x) -> Tensor")
_library.define(
    "experts_fixed_k(Tensor x, Tensor index, Tensor weight, Tensor body_out, Tensor[] params, int num_experts, "
    "str group='', int places=0) -> Tensor"
)
_library.define(
    "experts_variable_k(Tensor x, Tensor routed, Tensor weight, Tensor body_out, Tensor[] params, int num_experts, "
    "SymInt branches, bool coupled, str group='') -> Tensor"
)


def _expert_rows(x: Tensor) -> Tensor:
    return x.clone()


def _experts(x: Tensor, choice: Tensor, *_: Any) -> Tensor:
    raise NotImplementedError(
        f"the marker of a MoE layer was run ({x.shape[0]} rows, {choice.shape[-1]} choices each). It only stands for "
        "the layer until a pass replaces it and the expert's body before it. Please report this, unless you ran a "
        "graph of an earlier stage yourself"
    )


def _expert_rows_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _experts_fake(x: Tensor, choice: Tensor, weight: Tensor, body_out: Tensor, *_: Any) -> Tensor:
    return body_out.new_empty((x.shape[0], body_out.shape[1]))


_library.impl("expert_rows", _expert_rows, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::expert_rows", _expert_rows_fake, lib=_library)
for _marker in ("experts_fixed_k", "experts_variable_k"):
    _library.impl(_marker, _experts, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_marker}", _experts_fake, lib=_library)

ENTRY = torch.ops.moeca.expert_rows.default
MARKERS = (torch.ops.moeca.experts_fixed_k.default, torch.ops.moeca.experts_variable_k.default)
"""The ops that stand for a MoE layer in a graph: with fixed k, and with variable k."""


def exchange_of(marker: Any, args: Any) -> tuple[str, int]:
    """(the process group whose ranks hold the experts, the places of an expert in blocks), in a marker's arguments.

    The group is "" where this process has all of them.
    """
    given = args[6:] if marker in (MARKERS[0], MARKERS[0].overloadpacket) else args[8:]
    return (str(given[0]) if given else ""), int(given[1]) if given[1:] else 0
