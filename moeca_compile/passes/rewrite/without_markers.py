"""Dynamo's graph without marker ops: its MoE layers run expert by expert in plain Python.

Before:  rows = expert_rows(x); body_out = linear(rows, w0); out = experts_fixed_k(x, i, p, body_out, [w0, w1], 2)
After:   out = experts_0(i, p, [x], [w0, w1], [])

It is what runs when anything else fails, so it uses none of the other passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeca_compile.ops.exchange import count_of, room, run_on_ranks
from moeca_compile.ops.markers import MARKERS, exchange_of

Run = Callable[[int, Sequence[Tensor]], Tensor]
"""Runs an expert of this rank on its rows."""

_FIXED_K, _VARIABLE_K = ((marker, marker.overloadpacket) for marker in MARKERS)
_ENTRY = (torch.ops.moeca.expert_rows.default, torch.ops.moeca.expert_rows)


def markers(graph: fx.Graph) -> list[fx.Node]:
    """The MoE layers of a graph, Dynamo's or an exported one."""
    return [node for node in graph.nodes if node.target in (*_FIXED_K, *_VARIABLE_K)]


def without_markers(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which each MoE layer is a call of an `ExpertByExpert`."""
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for number, marker in enumerate(markers(result.graph)):
        _replace(result, marker, f"experts_{number}")
    result.recompile()
    return result


class ExpertByExpert(nn.Module):
    """A MoE layer as models write it. How many rows an expert has depends on the data, so torch.compile runs it as it
    is, between compiled parts.

    Args:
        body: one expert, from its rows, its parameters and what all experts share.
        experts: their number.
        fixed_k: whether a token's experts are given by their ids (T, k), else as a mask (T, E).
        exchange: the process group whose ranks hold so many experts each, "" where this process has all; and the
            places of an expert in blocks.
    """

    def __init__(self, body: fx.GraphModule, experts: int, fixed_k: bool, exchange: tuple[str, int]) -> None:
        super().__init__()
        self.body, self.experts, self.fixed_k = body, experts, fixed_k
        self.group, self.places = exchange

    @torch.compiler.disable
    def forward(
        self, choice: Tensor, weight: Tensor, rows: Sequence[Tensor], params: Sequence[Tensor], shared: Sequence[Any]
    ) -> Tensor:
        """choice, weight: (T, k), or (T, E) for variable k; rows: each (T, ...); returns (T, width)."""
        size = len(params) // self.experts

        def run(expert: int, own_rows: Sequence[Tensor]) -> Tensor:
            branch: Tensor = self.body(*own_rows, *params[expert * size : (expert + 1) * size], *shared)
            return branch

        chosen = [self._rows_of(expert, choice) for expert in range(self.experts * count_of(self.group))]
        given = [[each[tokens] for each in rows] for tokens, _ in chosen]
        branches = self._on_ranks(given, run, choice) if self.group else map(run, range(self.experts), given)
        out = None
        for expert, ((tokens, columns), branch) in enumerate(zip(chosen, branches, strict=True)):
            scale = weight[tokens, columns if self.fixed_k else expert]
            out = branch.new_zeros(len(choice), branch.shape[1]) if out is None else out
            out = out.index_add(0, tokens, branch * scale.unsqueeze(1).to(branch.dtype))
        assert out is not None
        return out

    def _rows_of(self, expert: int, choice: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of an expert, and its columns among theirs."""
        mask = choice == expert if self.fixed_k else choice[:, expert : expert + 1]
        tokens, columns = mask.nonzero().unbind(1)
        return tokens, columns

    def _on_ranks(self, given: Sequence[Sequence[Tensor]], run: Run, choice: Tensor) -> Iterable[Tensor]:
        """The outputs of all ranks' experts on their rows of this rank."""

        def run_own(arrived: Sequence[Tensor], offsets: Tensor) -> Tensor:
            bounds = pairwise(offsets.tolist())
            return torch.cat([run(e, [each[a:b] for each in arrived]) for e, (a, b) in enumerate(bounds)])

        counts = [len(rows[0]) for rows in given]
        offsets = torch.tensor([0, *accumulate(counts)], device=choice.device)
        most = room(self.places, len(choice), choice.shape[1], self.experts)
        rows = [torch.cat(each) for each in zip(*given, strict=True)]
        return run_on_ranks(self.group, rows, offsets, run_own, most).split(counts)


def _replace(gm: fx.GraphModule, marker: fx.Node, name: str) -> None:
    _, choice, weight, body_out, params, experts = marker.args[:6]
    exchange = exchange_of(marker.target, marker.args)
    own = list(params[: len(params) // experts])  # type: ignore[arg-type, index, operator]
    entries, inside = _body(body_out, own)  # type: ignore[arg-type]
    given = {*entries, *own, *inside}
    shared = list(dict.fromkeys(arg for node in inside for arg in node.all_input_nodes if arg not in given))
    body = _extracted(gm, body_out, [*entries, *own, *shared], inside)  # type: ignore[arg-type]
    gm.add_submodule(name, ExpertByExpert(body, experts, marker.target in _FIXED_K, exchange))  # type: ignore[arg-type]
    with gm.graph.inserting_before(marker):
        rows = [entry.args[0] for entry in entries]
        layer = gm.graph.call_module(name, (choice, weight, rows, params, shared))
    marker.replace_all_uses_with(layer)
    for node in (marker, *reversed(inside), *entries):
        if not node.users:
            gm.graph.erase_node(node)


def _body(body_out: fx.Node, own: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The entries of an expert's body, and the nodes that depend on these or on its parameters, in graph order."""
    reached: set[fx.Node] = set()
    pending = [body_out]
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            ends = node in own or node.target in (*_ENTRY, *_FIXED_K, *_VARIABLE_K)
            pending += () if ends else node.all_input_nodes
    ordered = _in_order(body_out.graph, reached)
    entries = [node for node in ordered if node.target in _ENTRY]
    inside: dict[fx.Node, None] = {}
    for node in ordered:
        if any(arg in inside or arg in entries or arg in own for arg in node.all_input_nodes) and node not in entries:
            inside[node] = None
    return entries, [node for node in inside if node not in own]


def _in_order(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    wanted = set(nodes)
    return [node for node in graph.nodes if node in wanted]


def _extracted(
    gm: fx.GraphModule, output: fx.Node, inputs: Sequence[fx.Node], inside: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in inside:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[output])
    return fx.GraphModule(gm, graph)
