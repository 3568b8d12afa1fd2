"""In Dynamo's graph, a number that changes from call to call becomes a 0-dim tensor input.

Before:  def forward(x, t: int):     time = torch.full((2,), t)
After:   def forward(x, t: Tensor):  time = t.to(torch.int64).expand((2,))

Otherwise each timestep that is passed as a Python number would be a constant, with a graph of its own.

Under `dynamic=True` Dynamo passes every float as a tensor and an `item()` call, also where only a number will do, as
for the eps of a norm. That tensor becomes a number, with a graph for each value:

Before:  def forward(x, eps: Tensor):  y = layer_norm(x, (8,), None, None, eps.item())
After:   def forward(x, eps: float):   y = layer_norm(x, (8,), None, None, eps)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import is_module_state, is_size, tensor_of_number
from moeca_compile.passes.analysis.graph import placeholders

_ARITHMETIC = {getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "neg", "mod")}
_FROM_NUMBER = (torch.tensor, tensor_of_number, torch.as_tensor, torch.scalar_tensor)


class ScalarInputs(NamedTuple):
    """Positions of the inputs that callers must pass otherwise than Dynamo does."""

    as_tensors: tuple[int, ...]
    as_numbers: tuple[int, ...]


def scalar_inputs_to_tensors(gm: fx.GraphModule, inputs: Sequence[Any]) -> ScalarInputs:
    """Rewrite `gm` in place.

    Sizes of tensors stay numbers, as do inputs that are used as a size or a bound.
    """
    as_tensors, as_numbers = [], []
    for position, node in enumerate(placeholders(gm.graph)):
        if isinstance(inputs[position], Tensor):
            if _number_instead(gm.graph, node):
                as_numbers.append(position)
        elif isinstance(inputs[position], (int, torch.SymInt)) and not is_size(node) and _only_a_value(node):
            as_tensors.append(position)
            _follow(gm.graph, node, node)
    gm.recompile()
    return ScalarInputs(tuple(as_tensors), tuple(as_numbers))


def _number_instead(graph: fx.Graph, tensor: fx.Node) -> bool:
    """Remove the `item()` calls of an input. Whether the input must now be a number."""
    items = [user for user in tensor.users if user.op == "call_method" and user.target == "item"]
    # A module's own number hardly ever changes.
    needed = is_module_state(tensor) or any(not _only_a_value(item) for item in items)
    as_number = bool(items) and needed and len(items) == len(tensor.users)
    for item in items:
        if not as_number:
            if not _only_a_value(item):
                continue
            _follow(graph, item, tensor)
        item.replace_all_uses_with(tensor)
        graph.erase_node(item)
    return as_number


def _only_a_value(number: fx.Node) -> bool:
    """Whether a number is used only in arithmetic or as the value of a new tensor."""
    for user in number.users:
        if user.target in _ARITHMETIC:
            numeric = not isinstance(user.meta.get("example_value"), Tensor)
            if numeric and not _only_a_value(user):
                return False
        elif user.target is torch.full:
            if not user.args or number in user.args[0]:  # type: ignore[operator]
                return False
        elif user.target not in _FROM_NUMBER:
            return False
    return True


def _follow(graph: fx.Graph, number: fx.Node, tensor: fx.Node) -> None:
    """Rewrite the users of a number that a 0-dim tensor replaces."""
    for user in list(number.users):
        if user.target in _ARITHMETIC and all(_is_number(arg, number) for arg in user.args):
            _follow(graph, user, user)
        elif user.target in _FROM_NUMBER:
            shape = [1] if isinstance(user.args[0], (list, tuple)) else []
            _replace(graph, user, tensor, shape)
        elif user.target is torch.full:
            _replace(graph, user, tensor, user.args[0])


def _is_number(arg: Any, number: fx.Node) -> bool:
    return arg is number or isinstance(arg, (int, float))


def _replace(graph: fx.Graph, user: fx.Node, tensor: fx.Node, shape: Any) -> None:
    """Replace `user`, which makes a tensor of the number, by a cast and an expand of the tensor."""
    example = user.meta["example_value"]
    dtype = user.kwargs.get("dtype") or example.dtype
    device = () if example.device.type == "cpu" else (example.device,)
    with graph.inserting_before(user):
        cast = graph.call_method("to", (tensor, *device, dtype))
        cast = graph.call_method("expand", (cast, shape))
    user.replace_all_uses_with(cast)
    graph.erase_node(user)
