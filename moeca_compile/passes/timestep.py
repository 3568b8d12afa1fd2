"""Find the timestep: the model's input that reaches a sinusoidal embedding."""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.token_axis import shape_of

aten = torch.ops.aten
_SINE = (aten.sin.default, aten.cos.default)


def find_timestep(graph: fx.Graph, user_inputs: set[fx.Node]) -> fx.Node | None:
    """The one scalar or per-sample input whose sine and cosine are taken; None where none or several are."""
    candidates = [
        node for node in user_inputs if "val" in node.meta and len(shape_of(node)) <= 1 and _reaches_both(node)
    ]
    return candidates[0] if len(candidates) == 1 else None


def _reaches_both(source: fx.Node) -> bool:
    """Follow the input while its values stay few: only shapes, dtypes and factors of frequency change on the way."""
    reached, stack, seen = set(), [source], {source}
    while stack:
        for user in stack.pop().users:
            if user.target in _SINE:
                reached.add(user.target)
            elif user not in seen and user.target not in (aten.linear.default, aten.embedding.default):
                seen.add(user)
                stack.append(user)
    return len(reached) == len(_SINE)
