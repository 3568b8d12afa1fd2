"""Steps traced for CUDA on a machine without it: shapes, dtypes and devices without data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from moeca_compile.backend import compile_graph
from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CapturedGraph, CompiledGraph
from moeca_compile.lower.in_place import write_in_place
from moeca_compile.lower.program import trace_step
from moeca_compile.lower.upload import upload_all
from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.policies.forecast import rule_of, weights_after_one
from tests.harness import captured

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class OnFakeCuda:
    """A model as the backend would get it of a model on CUDA, with fake tensors.

    Args:
        stay: names of arguments that the caller gives on the CPU.
    """

    def __init__(self, model: nn.Module, arguments: Sequence[Any], stay: Sequence[str] = ()) -> None:
        found = captured(model, *arguments)
        self.gm, self.user_inputs = found.gm, found.user_inputs
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        kept = {f"l_{name}_" for name in stay}
        with self.mode:
            self.inputs = [
                self._fake(value, CPU if node.name in kept else CUDA)
                for node, value in zip(placeholders, found.inputs, strict=True)
            ]
        for node, value in zip(placeholders, self.inputs, strict=True):
            node.meta["example_value"] = value
        _say_cuda(self.gm.graph)
        self.gm.recompile()

    def _fake(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)

    def compiled(self, **options: Any) -> CompiledGraph:
        """Nothing can run, so nothing is validated or recorded."""
        config = MoecaConfig.from_options({"recipe": "moeca", **options, "validate": False, "cuda_graphs": False})
        with self.mode, without_guards():
            return compile_graph(CapturedGraph(self.gm, tuple(self.user_inputs)), self.inputs, config, Notes())

    def step(self, compiled: CompiledGraph, kind: StepKind) -> fx.Graph:
        """The graph of a step as it is lowered for recording."""
        with self.mode, without_guards():
            state = Caches(compiled.plan.caches, CUDA)
            weights = weights_after_one(rule_of(compiled.config).slots, CUDA)
            placed = upload_all(self.inputs, compiled.uploaded, CUDA)
            traced = trace_step(compiled.function(kind), placed, state, weights)
            return write_in_place(traced, state).graph.graph


@contextmanager
def without_guards() -> Iterator[None]:
    """Some methods of tensors ask for the device first, which is not there; the ops that they call do not."""
    methods = {
        "__getitem__": _indexed,
        "contiguous": torch.ops.aten.contiguous,
        "__invert__": torch.ops.aten.bitwise_not,
        "pin_memory": lambda value: value,
    }
    with pytest.MonkeyPatch.context() as patch:
        for kind in (FakeTensor, FunctionalTensor):
            for name, op in methods.items():
                patch.setattr(kind, name, lambda *args, op=op, **kwargs: op(*args, **kwargs), raising=False)
        yield


def _indexed(value: Any, index: Any) -> Any:
    if isinstance(index, Tensor):
        return torch.ops.aten.index(value, [index])
    index = index if isinstance(index, tuple) else (index,)
    named = sum(each is not None and each is not ... for each in index)
    place = 0
    for each in index:
        if each is ...:
            place += value.ndim - named
        elif each is None:
            value, place = value.unsqueeze(place), place + 1
        elif isinstance(each, slice):
            sliced = each != slice(None)
            value = torch.ops.aten.slice(value, place, each.start, each.stop, each.step or 1) if sliced else value
            place += 1
        else:
            value, named = value.select(place, each), named - 1
    return value


def _say_cuda(graph: fx.Graph) -> None:
    """Devices that Dynamo wrote down as it traced on the CPU."""
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda arg: CUDA if arg == CPU else arg)
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda arg: CUDA if arg == CPU else arg)
