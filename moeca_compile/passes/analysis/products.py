"""Matrix products, however written, in einsum form: one label for each dim of the operands and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeca_compile.ops.aten import MATMULS
from moeca_compile.passes.analysis.graph import shape_of

aten = torch.ops.aten
Labels = tuple[str, ...]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Product:
    """out = einsum of two operands; a dim of size 1 broadcasts, as in matmul."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels

    @property
    def batch(self) -> Labels:
        """Labels that both operands and the result have."""
        return tuple(label for label in self.out_labels if label in self.left_labels and label in self.right_labels)

    @property
    def contracted(self) -> str | None:
        """The one label that is summed over; None where there are several, or none."""
        gone = {label for label in self.left_labels if label in self.right_labels} - set(self.out_labels)
        return gone.pop() if len(gone) == 1 else None

    @property
    def sizes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for operand, labels in ((self.left, self.left_labels), (self.right, self.right_labels)):
            for label, size in zip(labels, shape_of(operand), strict=True):
                found[label] = max(size, found.get(label, 1))
        return found

    def operand(self, label: str) -> tuple[fx.Node, list[str]]:
        """The operand that has this label, with its labels."""
        if label in self.left_labels:
            return self.left, list(self.left_labels)
        return self.right, list(self.right_labels)


def product(node: object) -> Product | None:
    """The product that `node` computes; None where it is not a product of two operands with distinct labels."""
    if not isinstance(node, fx.Node):
        return None
    args: Any = node.args
    if node.target in MATMULS:
        return _matmul(node, *args[:2])
    if node.target is aten.baddbmm.default:
        return _matmul(node, *args[1:3])
    if node.target is aten.einsum.default and len(args[1]) == 2:
        return _einsum(node, args[0].replace(" ", ""), *args[1])
    return None


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    one, other = len(shape_of(left)), len(shape_of(right))
    if min(one, other) < 2:
        return None
    batch = tuple(_LETTERS[: max(one, other) - 2])
    row, inner, column = "row", "inner", "column"
    left_labels = (*batch[len(batch) - one + 2 :], row, inner)
    right_labels = (*batch[len(batch) - other + 2 :], inner, column)
    return Product(node, left, right, left_labels, right_labels, (*batch, row, column))


def _einsum(node: fx.Node, equation: str, left: fx.Node, right: fx.Node) -> Product | None:
    if "." in equation or "->" not in equation or len(equation.split("->")[0].split(",")) != 2:
        return None
    inputs, out = equation.split("->")
    one, other = (tuple(labels) for labels in inputs.split(","))
    distinct = all(len(set(labels)) == len(labels) for labels in (one, other))
    summed_alone = (set(one) ^ set(other)) - set(out)
    return Product(node, left, right, one, other, tuple(out)) if distinct and not summed_alone else None
