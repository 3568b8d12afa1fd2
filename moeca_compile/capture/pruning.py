"""Takes out statements whose results nobody reads any more."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from moeca_compile.capture.dataflow import CALLS_SELF, Flow
from moeca_compile.capture.syntax import names_bound, names_read, plain_names, simple_statements, with_blocks


class Pruning:
    """What may go of a method. used: the ids of the values that only its dispatch was made from."""

    def __init__(self, flow: Flow, used: set[int]) -> None:
        self.flow, self.used = flow, used

    def pruned(self, statements: Sequence[ast.stmt], live: set[str]) -> tuple[list[ast.stmt], set[str]]:
        """The statements without those whose results nobody reads, and the names that they read."""
        kept: list[ast.stmt] = []
        for statement in reversed(statements):
            left = self.without_idle_parts(statement, live)
            if left is None:
                continue
            if isinstance(left, (ast.Assign, ast.AnnAssign)):
                targets = left.targets if isinstance(left, ast.Assign) else [left.target]
                live = live - {name for target in targets for name in plain_names(target)}
            kept.insert(0, left)
            live = live | names_read(left)
        return kept, live

    def without_idle_parts(self, statement: ast.stmt, live: set[str]) -> ast.stmt | None:
        if isinstance(statement, (ast.If, ast.With)):
            parts = {
                field: self.pruned(getattr(statement, field), live)[0]
                for field in ("body", "orelse")
                if hasattr(statement, field)
            }
            if not any(parts.values()):
                return None
            return with_blocks(statement, parts)
        simple = [statement]
        if isinstance(statement, ast.For):
            simple = list(simple_statements([statement]))
            if plain_names(statement.target) & live:
                return statement
        return None if all(self.idle(each, live) for each in simple) else statement

    def idle(self, statement: ast.stmt, live: set[str]) -> bool:
        """Whether a statement changes nothing but locals that nobody reads any more."""
        bound = names_bound(statement)
        if bound is None or bound & live:
            return False
        inside = set(ast.walk(statement))
        for problem in self.flow.problems:
            if problem.node in inside:
                value = self.flow.at.get(problem.node)
                if problem.what != CALLS_SELF or id(value) not in self.used:
                    return False
        return True
