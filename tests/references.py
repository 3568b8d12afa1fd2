"""Plain meanings to hold the compiler's graphs against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tests.harness import nodes_of


def run_with_markers(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph in which `moeca::experts` takes its meaning: the body of expert 0 with each expert's
    parameters.

    gm: Dynamo's graph or its functional export; inputs: one for each placeholder. Returns what the graph
    returns.
    """
    with torch.no_grad():
        return _MarkerInterpreter(gm).run(*inputs)


class _MarkerInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.layers = nodes_of(gm, torch.ops.moeca.experts)

    def run_node(self, n: fx.Node) -> Any:
        return self.experts(n) if n in self.layers else super().run_node(n)

    def experts(self, layer: fx.Node) -> Tensor:
        """out[t] = sum_j weight[t, j] * expert_index[t, j](x[t])"""
        _, index_node, weight_node, body_out, params, num_experts = layer.args
        index, weight = self.env[index_node], self.env[weight_node]
        own = params[: len(params) // num_experts]
        out = torch.zeros_like(self.env[body_out])
        for expert in range(num_experts):
            theirs = params[expert * len(own) : (expert + 1) * len(own)]
            replaced = {mine: self.env[other] for mine, other in zip(own, theirs, strict=True)}
            branch = self.value(body_out, replaced)
            out += branch * (weight * (index == expert)).sum(1, keepdim=True).to(branch.dtype)
        return out

    def value(self, node: fx.Node, replaced: dict[fx.Node, Any]) -> Any:
        """The value of `node` with other values for some nodes; back to the marker the body starts from."""
        if node not in replaced:
            if node.op in ("placeholder", "get_attr") or node in nodes_of(self.module, torch.ops.moeca.expert_rows):
                replaced[node] = self.env[node]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: self.value(each, replaced))
                replaced[node] = getattr(self, node.op)(node.target, args, kwargs)
        return replaced[node]
