"""Plain meanings to hold the compiler's graphs against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tests.harness import nodes_of


def run_with_markers(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph in which `moeca::experts_fixed_k` and `moeca::experts_variable_k` take their meaning: the body of
    expert 0 with each expert's parameters.

    gm: Dynamo's graph or its functional export; inputs: one for each placeholder. Returns what the graph
    returns.
    """
    with torch.no_grad():
        return _MarkerInterpreter(gm).run(*inputs)


class _MarkerInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.meaning = {node: self.experts for node in nodes_of(gm, torch.ops.moeca.experts_fixed_k)}
        self.meaning |= {node: self.pairs for node in nodes_of(gm, torch.ops.moeca.experts_variable_k)}

    def run_node(self, n: fx.Node) -> Any:
        return self.meaning[n](n) if n in self.meaning else super().run_node(n)

    def experts(self, layer: fx.Node) -> Tensor:
        """out[t] = sum_j weight[t, j] * expert_index[t, j](x[t])"""
        index, weight = self.env[layer.args[1]], self.env[layer.args[2]]
        return self.summed(layer, lambda expert: (weight * (index == expert)).sum(1))

    def pairs(self, layer: fx.Node) -> Tensor:
        """out[t] = sum_e routed[t, e] * weight[t, e] * expert_e(x[t])"""
        routed, weight = self.env[layer.args[1]], self.env[layer.args[2]]
        assert routed.dtype == torch.bool and routed.shape == weight.shape == (
            len(self.env[layer.args[0]]),
            layer.args[5],
        )
        return self.summed(layer, lambda expert: weight[:, expert].where(routed[:, expert], 0))

    def summed(self, layer: fx.Node, weight_of: Callable[[int], Tensor]) -> Tensor:
        """The outputs of all experts on all rows, each weighted, added up."""
        body_out, params, num_experts = layer.args[3:6]
        own = params[: len(params) // num_experts]
        out = torch.zeros_like(self.env[body_out])
        for expert in range(num_experts):
            theirs = params[expert * len(own) : (expert + 1) * len(own)]
            replaced = {mine: self.env[other] for mine, other in zip(own, theirs, strict=True)}
            branch = self.value(body_out, replaced)
            out += branch * weight_of(expert).unsqueeze(1).to(branch.dtype)
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
