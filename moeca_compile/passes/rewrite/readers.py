"""Who may still read each value of an evaluation: what tells when a value can be dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set

from torch import fx

from moeca_compile.passes.analysis.graph import draws_random_numbers


class Readers:
    """For each value, the number of nodes that have yet to be computed and may read it.

    A node reads its inputs. A replaced node may read whatever its op would have been computed from, back to what the
    evaluation computes anyway, since its replacement may run any of that, whole or on chosen tokens; and what it
    declares besides.

    Args:
        needed: the nodes that the evaluation computes, in any case.
        replaced: the nodes whose values replacements give.
        declared: what replacements read besides, by replaced node. Values of replaced nodes that are not among them
            are never dropped.
        kept: nodes whose values are read after the evaluation.
    """

    def __init__(
        self,
        needed: Set[fx.Node],
        replaced: Set[fx.Node],
        declared: Mapping[fx.Node, Iterable[fx.Node]],
        kept: Iterable[fx.Node],
    ) -> None:
        self.read_by: dict[fx.Node, set[fx.Node]] = {node: set(node.all_input_nodes) for node in needed}
        for node in needed & replaced:
            self.read_by[node] = _behind(node, needed) | set(declared.get(node, ()))
        self.left = Counter(value for values in self.read_by.values() for value in values)
        self.left.update([*kept, *(replaced - declared.keys())])

    def computed(self, node: fx.Node) -> list[fx.Node]:
        """Register that `node` was computed. Returns the nodes whose values nobody reads any more."""
        return self.done_with(self.read_by.pop(node, ()))

    def done_with(self, read: Iterable[fx.Node]) -> list[fx.Node]:
        """Register one reader less of each of these. Returns those that nobody reads any more."""
        read = list(read)
        self.left.subtract(read)
        return [value for value in read if self.left[value] == 0 and _may_be_dropped(value)]


def _behind(node: fx.Node, needed: Set[fx.Node]) -> set[fx.Node]:
    """All that `node` is computed from, back to nodes that are computed anyway, and including those."""
    found: set[fx.Node] = set()
    stack = node.all_input_nodes
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            if current not in needed:
                stack.extend(current.all_input_nodes)
    return found


def _may_be_dropped(node: fx.Node) -> bool:
    """Whether the value could be computed once more. Inputs and constants belong to others, and need no dropping."""
    # By torch's own answer every attention draws random numbers, since it may drop out.
    return node.op == "call_function" and not draws_random_numbers(node) and not node.is_impure(impure_random=False)
