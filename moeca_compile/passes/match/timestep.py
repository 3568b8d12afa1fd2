"""Find the timestep: a model's input that reaches a sinusoidal embedding."""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.analysis.graph import shape_of

aten = torch.ops.aten
_SINE = (aten.sin.default, aten.cos.default)


def find_timesteps(user_inputs: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The scalar or per-sample inputs whose sine and cosine are taken, in graph order.

    Where a guidance scale is embedded like the timestep there are two. Only the calls can distinguish them.
    """
    return tuple(
        node
        for node in sorted(user_inputs)
        if "val" in node.meta and all(size == 1 for size in shape_of(node)[1:]) and _reaches_both(node)
    )


def find_times_of_tokens(user_inputs: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The inputs with a number for each token whose sine and cosine are taken: timesteps, or positions."""
    known = find_timesteps(user_inputs)
    floating = [n for n in sorted(user_inputs) if "val" in n.meta and n.meta["val"].dtype.is_floating_point]
    return tuple(node for node in floating if node not in known and _reaches_both(node))


def _reaches_both(source: fx.Node) -> bool:
    """Whether both sine and cosine are taken of the input, before any linear or embedding layer."""
    reached, stack, seen = set(), [source], {source}
    while stack:
        for user in stack.pop().users:
            if user.target in _SINE:
                reached.add(user.target)
            elif user not in seen and user.target not in (aten.linear.default, aten.embedding.default):
                seen.add(user)
                stack.append(user)
    return len(reached) == len(_SINE)
