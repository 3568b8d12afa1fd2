"""Dynamo's graph -> functional pre-dispatch ATen with fake values on every node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from moeca_compile._torch_private import export_functional
from moeca_compile.passes.listed_parameters import ListedParameters


def to_functional_aten(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Return `gm` as functional ATen, one placeholder per input, in the same order.

    Pre-dispatch does not decompose `linear`, `scaled_dot_product_attention`, `layer_norm` and `topk`, which the
    matchers look for. Every node of the result has a fake value in `meta["val"]`.
    """
    listed = ListedParameters.of(gm.graph) if isinstance(gm, fx.GraphModule) else None
    if listed is None:
        return _exported(gm, inputs)
    exported = _exported(listed.removed_from(gm), [inputs[position] for position in listed.traced])
    return listed.restored_to(exported) or _exported(gm, inputs)


def _exported(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    with torch.no_grad():
        exported = export_functional(gm, inputs)
    _drop_assertions(exported.graph)
    if any("val" not in node.meta for node in exported.graph.nodes if node.op == "call_function"):
        FakeTensorProp(exported).propagate(*inputs)
    exported.recompile()
    return exported


def _drop_assertions(graph: fx.Graph) -> None:
    """Tensor-metadata assertions hold by construction here: shapes, dtypes and devices are guarded."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
