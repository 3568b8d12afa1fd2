"""Runs a layer on given arguments and says what was computed: a graph of ATen ops, and the values in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from moeca_compile._torch_private import groups_held, trace_by_running, version_of
from moeca_compile.capture.idioms.trials import cloned
from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.running.watch import Asked, Watch
from moeca_compile.capture.structure import named_tensors
from moeca_compile.ops import exchange  # noqa: F401  (defines the op)

EXCHANGE = torch.ops.moeca.exchange_alone.default
"""What stands in a graph for an exchange with other ranks."""
LIMIT = 4 * 2**30
"""The bytes that the values of one layer's graph may take, all of them together."""


_aten = torch.ops.aten
_FILLED = {
    _aten.new_zeros.default: 0,
    _aten.zeros_like.default: 0,
    _aten.new_ones.default: 1,
    _aten.ones_like.default: 1,
    _aten.new_empty.default: 0,
    _aten.empty_like.default: 0,
}
_OF_NOTHING = (_aten.sum.default, _aten.mean.default, _aten.sum.dim_IntList, _aten.mean.dim, _aten.to.dtype)


@dataclass(frozen=True)
class Call:
    """Arguments of a layer's forward: all of them, in the order of `facts`."""

    args: list[Any]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        return [each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor)]

    def with_tensors(self, tensors: list[Tensor]) -> Call:
        """The same call with other tensors."""
        given = iter(tensors)
        args = [next(given) if isinstance(each, Tensor) else each for each in self.args]
        return Call(args, {k: next(given) if isinstance(each, Tensor) else each for k, each in self.kwargs.items()})


@dataclass(frozen=True)
class Trace:
    """What a call computed.

    graph: functional ATen; its placeholders are the call's tensors, then those of the layer
    names: of the layer's tensors, in the order of their placeholders
    values: what each node was
    """

    graph: fx.Graph
    names: tuple[str, ...]
    values: dict[fx.Node, Any]


def isolated(layer: nn.Module) -> nn.Module:
    """A copy that has the layer's parameters, and nothing else of it that running it may change."""
    return copy.deepcopy(layer, {id(each): each for each in (*layer.parameters(), *groups_held(layer).values())})


def run(layer: nn.Module, forward: Any, call: Call, asked: Asked | None = None) -> tuple[Any, nn.Module]:
    """(what the layer returns, a copy of it after the call). Raises UntrustedError where it has side effects."""
    copied = isolated(layer)
    versions = [version_of(each) for each in layer.parameters()]
    given = Call(cloned(call.args), dict(zip(call.kwargs, cloned(list(call.kwargs.values())), strict=True)))
    random = _random_states(call)
    if asked is None:
        result = forward(copied, *given.args, **given.kwargs)
    else:
        asked.layer = copied
        with Watch(asked, given.tensors()):
            result = forward(copied, *given.args, **given.kwargs)
    if any(not torch.equal(a, b) for a, b in zip(random, _random_states(call), strict=True)):
        raise UntrustedError("it is random")
    if versions != [version_of(each) for each in layer.parameters()]:
        raise UntrustedError("it changes its parameters")
    if any(_differs(a, b) for a, b in zip(call.tensors(), given.tensors(), strict=True)):
        raise UntrustedError("it changes its arguments")
    return result, copied


def traced(layer: nn.Module, forward: Any, call: Call) -> Trace:
    """The graph of a call. Raises UntrustedError where there is none."""
    copied = isolated(layer)
    forward_of_copy = _Forward(copied, forward)
    state = dict(named_tensors(copied))  # the copy's own buffers
    tensors, count = [*cloned(call.tensors()), *state.values()], len(call.tensors())

    def computed(*given: Tensor) -> Any:
        of_call, held = call.with_tensors(list(given[:count])), given[count:]
        named = {f"layer.{name}": tensor for name, tensor in zip(state, held, strict=True)}
        return functional_call(forward_of_copy, named, tuple(of_call.args), of_call.kwargs)

    module = trace_by_running(computed, tensors, EXCHANGE)
    if module is None:
        raise UntrustedError("this version of torch cannot trace it by running it")
    _without_templates(module)
    _without_nothing(module, count)
    interpreter = _Limited(module)
    interpreter.run(*cloned(call.tensors()), *(tensor for _, tensor in named_tensors(isolated(layer))))
    return Trace(module.graph, tuple(state), dict(interpreter.env))


def written(before: nn.Module, after: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) for all that holds tensors and that a call has changed: buffers by their own names."""
    for old, new in zip(before.modules(), after.modules(), strict=True):
        yield from (
            (old, name) for name, held in new.named_buffers(recurse=False) if _differs(getattr(old, name), held)
        )
        for name, held in vars(new).items():
            if not name.startswith("_") and _changed(vars(old).get(name), held):
                yield old, name


def counted(before: nn.Module, after: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module after the call, attribute) for the numbers that calls have changed."""
    for old, new in zip(before.modules(), after.modules(), strict=True):
        for name, value in vars(new).items():
            if type(value) in (int, float) and vars(old).get(name) != value:
                yield new, name


def snapshot(value: Any) -> Any:
    """What is equal as long as a value and all that it contains are the same."""
    if isinstance(value, dict):
        return [(key, snapshot(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [snapshot(each) for each in value]
    return value if value is None or type(value) in (bool, int, float, str) else id(value)


class _Forward(nn.Module):
    """A layer's own forward as a module's, under whatever name the layer has it."""

    def __init__(self, layer: nn.Module, forward: Any) -> None:
        super().__init__()
        self.layer, self.of_layer = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.of_layer(self.layer, *args, **kwargs)


def _without_templates(module: fx.GraphModule) -> None:
    """`y.new_zeros(size)`, `zeros_like(y)` without y, of which they need only what it is, not its numbers."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in _FILLED:
            with module.graph.inserting_before(node):
                like = node.meta["val"] if isinstance(node.meta.get("val"), Tensor) else None
                if like is None:
                    continue
                how = {"dtype": like.dtype, "device": like.device}
                filled = module.graph.call_function(
                    torch.ops.aten.full.default, (list(like.shape), _FILLED[node.target]), how
                )
            node.replace_all_uses_with(filled)
            module.graph.erase_node(node)
    module.recompile()


def _without_nothing(module: fx.GraphModule, arguments: int) -> None:
    """`out + 0 * expert(zeros).sum()` is `out`: so an expert without rows is touched, whose gradient is wanted."""
    made_of_data = set([node for node in module.graph.nodes if node.op == "placeholder"][:arguments])
    nothing: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        by_zero = node.target is _aten.mul.Tensor and any(
            type(each) in (int, float) and each == 0 for each in node.args
        )
        if not made_of_data.isdisjoint(node.all_input_nodes):
            made_of_data.add(node)
        elif by_zero or (node.target in _OF_NOTHING and nothing.issuperset(node.all_input_nodes)):
            nothing.add(node)
        if node.target is _aten.add.Tensor and not nothing.isdisjoint(node.all_input_nodes) and not node.kwargs:
            kept = next((each for each in node.args if isinstance(each, fx.Node) and each not in nothing), node)
            like, value = kept.meta.get("val"), node.meta.get("val")
            if isinstance(like, Tensor) and (like.shape, like.dtype) == (value.shape, value.dtype):
                node.replace_all_uses_with(kept)
    module.recompile()


class _Limited(fx.Interpreter):
    """Keeps all values, so many and no more."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.bytes = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.bytes += value.numel() * value.element_size()
            if self.bytes > LIMIT:
                raise UntrustedError(
                    f"what it computes takes more than {LIMIT >> 30} GiB, too much to be looked through"
                )
        return value


def _random_states(call: Call) -> list[Tensor]:
    devices = {each.device for each in call.tensors() if each.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, however nested in containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in tensors_in(part)] if isinstance(value, (tuple, list, set)) else []


def _changed(old: Any, new: Any) -> bool:
    was, now = tensors_in(old), tensors_in(new)
    return len(was) != len(now) or any(_differs(a, b) for a, b in zip(was, now, strict=True))


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.nan_to_num(), b.nan_to_num())
