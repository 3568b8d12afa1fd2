"""Find the timestep: a model's input that reaches a sinusoidal embedding, or else one that has its form."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from moeca_compile.passes.analysis.graph import shape_of

aten = torch.ops.aten
_SINE = (aten.sin.default, aten.cos.default)
_PRODUCTS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_LOOKUPS = {aten.embedding.default: 0, aten.index.Tensor: 0, aten.index_select.default: 0, aten.gather.default: 0}
"""Ops that take rows of a table, with the position of the table."""


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


def guess_timesteps(user_inputs: set[fx.Node], samples: int) -> tuple[fx.Node, ...]:
    """The inputs that have the form of a timestep, in graph order, for a model that takes no sines of any.

        x, sigma, y -> linear(log(sigma) / 4) + embedding(y)    sigma, by a linear layer
        x, t, y     -> table[t.long()] + embedding(y)           t, whose row is looked up
        x, step, y  -> embedding(step) + embedding(y)           step and y: both are integers

    Such an input has one number for each sample, or one for all, and a linear layer or a table takes what is computed
    of it alone. Integers may be class labels: a floating-point number goes before them.
    """
    scalars = [n for n in sorted(user_inputs) if _per_sample(n, samples) and _enters_alone(n, user_inputs - {n})]
    only_integers = not any(node.meta["val"].dtype.is_floating_point for node in scalars)
    return () if only_integers and find_times_of_tokens(user_inputs) else tuple(scalars)


def _per_sample(node: fx.Node, samples: int) -> bool:
    """Whether an input has one number for each sample, or one for all. Passes that are joined share those of one."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool or value.is_complex():
        return False
    return value.numel() > 0 and samples % value.numel() == 0 and value.numel() == (*value.shape, 1)[0]


def _enters_alone(source: fx.Node, others: set[fx.Node]) -> bool:
    """Whether a linear layer, or a table, takes what is computed of an input and of no other."""
    alone = _reached([source]) - _reached(others)
    return any(
        node.target in _PRODUCTS or (node.target in _LOOKUPS and node.args[_LOOKUPS[node.target]] not in alone)
        for node in alone
    )


def _reached(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """All that is computed of these, and they themselves."""
    reached, stack = set(sources), [*sources]
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached.add(user)
                stack.append(user)
    return reached


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
