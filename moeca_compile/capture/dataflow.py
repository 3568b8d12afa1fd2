"""Where a method's values come from: its straight-line meaning as a graph of values.

`follow(tree)` runs a method's code once, in eval mode, symbolically: every local name stands for the
value last bound to it, a loop's body is gone through once, both sides of an `if` in turn. The result answers
the questions the idioms ask ("is what is returned scattered from rows of which parameter?") whatever the
locals are called and however the expressions are nested. It is an approximation on purpose: an idiom that it
recognizes is checked with numbers before it is used (trust.py).

`torch.f(a, b)` and `a.f(b)` become the same `call f(a, b)`; an in-place call or an augmented assignment
rebinds the name it changes. Code that changes `self` or an argument, or whose effect cannot be followed, is
listed in `problems`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Value:
    """One value; `operands` are what it is made from, `name` is told by `kind`:

    self, counter (of an enumerate), constant, parameter and global (their names)
    attribute: of (base,)
    index:     (base, subscript)
    call:      the function's last name, "" when a value is called; (receiver if it is a value, *arguments);
               the receiver of a call of self is the attribute that is called
    element:   of (iterable,), a loop variable
    operation: the operator or the syntax node, e.g. Mult, FloorDiv, Eq, Slice, IfExp

    `node` is the syntax that made it: an expression, or the statement that changed a local.
    """

    kind: str
    name: str = ""
    operands: tuple[Value, ...] = ()
    node: ast.AST | None = None

    def ancestors(self) -> Iterator[Value]:
        """This value and everything it is made from, each once."""
        seen: set[int] = set()
        pending = [self]
        while pending:
            value = pending.pop()
            if id(value) not in seen:
                seen.add(id(value))
                yield value
                pending.extend(value.operands)

    def calls(self, *names: str) -> list[Value]:
        """The calls of functions with one of these names among the ancestors."""
        return [value for value in self.ancestors() if value.kind == "call" and value.name in names]

    def needs(self, other: Value) -> bool:
        return any(value is other for value in self.ancestors())


Names = dict[str, Value]
OPTIONAL_ARGUMENTS = "it has optional or variable arguments"
CALLS_SELF = "a call of a method or module of self"
CHANGES_ARGUMENT = "it changes self or an argument"


@dataclass(frozen=True)
class Problem:
    """Syntax whose effect an equivalent of the whole method would lose; `what` says why."""

    node: ast.AST
    what: str


@dataclass
class Flow:
    """What `follow` found.

    parameters: without self, whose name is `self_name`
    returned, called: the returned values; the calls
    made: every value, after what it is made from
    at: the value of each expression node; before, after: of each name around each statement node
    problems: what it could not follow
    """

    parameters: tuple[str, ...]
    self_name: str = "self"
    returned: list[Value] = field(default_factory=list)
    called: list[Value] = field(default_factory=list)
    made: list[Value] = field(default_factory=list)
    at: dict[ast.AST, Value] = field(default_factory=dict)
    before: dict[ast.AST, Names] = field(default_factory=dict)
    after: dict[ast.AST, Names] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def unsupported(self) -> str | None:
        """Why an equivalent of the whole method would lose some of its effect; None where it would not."""
        if not self.problems:
            return None
        line = getattr(self.problems[0].node, "lineno", 0)
        return f"line {line} of it is not followed: {self.problems[0].what}"


def follow(tree: ast.FunctionDef) -> Flow:
    """The values of a method (see the module's docstring). The first parameter is taken for self."""
    arguments = tree.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    if not names:
        return Flow((), problems=[Problem(tree, "it takes no self")])
    flow = Flow(tuple(names[1:]), names[0])
    if arguments.vararg or arguments.kwarg or arguments.defaults or any(arguments.kw_defaults):
        flow.problems.append(Problem(tree, OPTIONAL_ARGUMENTS))
    walker = _Walker(flow, names[0])
    walker.block(tree.body)
    return flow


class _Walker:
    """Goes through statements in order and keeps the value of every local name."""

    def __init__(self, flow: Flow, self_name: str) -> None:
        self.flow = flow
        self.values: Names = {name: self.make("parameter", name) for name in flow.parameters}
        self.values[self_name] = self.make("self")

    def make(self, kind: str, name: str = "", operands: tuple[Value, ...] = (), node: ast.AST | None = None) -> Value:
        value = Value(kind, name, operands, node)
        self.flow.made.append(value)
        return value

    # statements

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.flow.before[statement] = dict(self.values)
            self.statement(statement)
            self.flow.after[statement] = dict(self.values)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self.bind(target, value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.bind(node.target, self.value(node.value))
        elif isinstance(node, ast.AugAssign):
            self.augment(node)
        elif isinstance(node, ast.For):
            self.bind_loop(node.target, self.value(node.iter))
            self.block([*node.body, *node.orelse])
        elif isinstance(node, ast.If):
            self.block([] if self.in_training_only(node.test) else node.body)
            self.block([] if self.in_training_only(_negated(node.test)) else node.orelse)
        elif isinstance(node, ast.With) and all(_is_no_grad(item.context_expr) for item in node.items):
            self.block(node.body)
        elif isinstance(node, ast.Return):
            self.flow.returned.append(self.value(node.value) if node.value else self.make("constant", "None"))
        elif isinstance(node, ast.Expr):
            self.effect(node.value)
        elif not isinstance(node, (ast.Continue, ast.Pass, ast.Assert, ast.Raise)):
            self.unsupported(node, type(node).__name__.lower())

    def in_training_only(self, test: ast.expr | None) -> bool:
        """Whether a condition cannot hold in eval mode: `self.training`, alone or in an `and`."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return any(self.in_training_only(part) for part in test.values)
        value = self.value(test) if isinstance(test, ast.Attribute) else None
        return value is not None and value.name == "training" and value.operands[0].kind == "self"

    def effect(self, node: ast.expr) -> None:
        """An expression for its effect: an in-place call on a local rebinds it, others are not followed."""
        if isinstance(node, ast.Constant):
            return
        value = self.value(node)
        root = _root_name(node)
        if root in self.values and isinstance(node, ast.Call):
            self.rebind(node, root, value)
        else:
            self.unsupported(node, "a call whose effect is not on a local tensor")

    def augment(self, node: ast.AugAssign) -> None:
        root = _root_name(node.target)
        if root not in self.values:
            return self.unsupported(node, "an assignment to something that is no local")
        old, change = self.values[root], self.value(node.value)
        if isinstance(node.target, ast.Subscript):
            name = "index_add_" if isinstance(node.op, ast.Add) else "index_put_"
            change = self.make("call", name, (old, self.value(node.target.slice), change), node)
        else:
            change = self.make("operation", type(node.op).__name__, (old, change), node)
        self.rebind(node, root, change)

    def bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.values[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for position, part in enumerate(target.elts):
                self.bind(part, self.part(value, position, len(target.elts)))
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            old = self.value(target.value)
            written = self.make("call", "index_put_", (old, self.value(target.slice), value), target)
            self.rebind(target, target.value.id, written)
        else:
            self.unsupported(target, "an assignment to something that is no local")

    def bind_loop(self, target: ast.expr, iterable: Value) -> None:
        """Bind a loop's variables, through enumerate and zip, to elements of what is looped over."""
        targets = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
        if iterable.kind == "call" and iterable.name == "enumerate" and len(targets) == 2:
            self.bind(targets[0], self.make("counter"))
            self.bind_loop(targets[1], iterable.operands[0])
        elif iterable.kind == "call" and iterable.name == "zip" and 0 < len(targets) <= len(iterable.operands):
            for part, source in zip(targets, iterable.operands, strict=False):  # without zip's own `strict`
                self.bind_loop(part, source)
        else:
            self.bind(target, self.make("element", "", (iterable,)))

    def rebind(self, node: ast.AST, name: str, value: Value) -> None:
        """Give a local the value that a change in place left it with; what is no local is not followed."""
        if name not in self.values:
            return self.unsupported(node, "a change of something that is no local")
        if self.values[name].kind in ("parameter", "self"):
            self.unsupported(node, CHANGES_ARGUMENT)
        self.values[name] = value

    def unsupported(self, node: ast.AST, what: str) -> None:
        self.flow.problems.append(Problem(node, what))

    def part(self, value: Value, position: int, count: int) -> Value:
        if value.kind == "operation" and value.name in ("Tuple", "List") and len(value.operands) == count:
            return value.operands[position]
        return self.make("operation", f"part {position}", (value,))

    # expressions

    def value(self, node: ast.expr) -> Value:
        self.flow.at[node] = value = self.evaluated(node)
        return value

    def evaluated(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Name):
            return self.values.get(node.id) or self.make("global", node.id, (), node)
        if isinstance(node, ast.Constant):
            return self.make("constant", repr(node.value), (), node)
        if isinstance(node, ast.Attribute):
            return self.make("attribute", node.attr, (self.value(node.value),), node)
        if isinstance(node, ast.Subscript):
            return self.make("index", "", (self.value(node.value), self.value(node.slice)), node)
        if isinstance(node, ast.Call):
            return self.call(node)
        return self.make("operation", _operator(node), tuple(self.children(node)), node)

    def call(self, node: ast.Call) -> Value:
        arguments = [self.value(argument) for argument in node.args]
        arguments += [self.value(keyword.value) for keyword in node.keywords]
        name, receiver = "", []
        if isinstance(node.func, ast.Attribute):
            name, base = node.func.attr, self.value(node.func.value)
            receiver = [] if _is_module_path(base) else [base]
            if base.kind == "self":
                self.unsupported(node, CALLS_SELF)
                receiver = [self.make("attribute", name, (base,), node.func)]
                self.flow.at[node.func] = receiver[0]
        elif isinstance(node.func, ast.Name) and node.func.id not in self.values:
            name = node.func.id
        else:
            receiver = [self.value(node.func)]
        value = self.make("call", name, (*receiver, *arguments), node)
        self.flow.called.append(value)
        return value

    def children(self, node: ast.expr) -> Iterator[Value]:
        outer = dict(self.values)
        for generator in getattr(node, "generators", []):
            self.bind_loop(generator.target, self.value(generator.iter))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield self.value(child)
        self.values = outer


def _negated(test: ast.expr) -> ast.expr | None:
    return test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else None


def _is_no_grad(node: ast.expr) -> bool:
    function = node.func if isinstance(node, ast.Call) else None
    return isinstance(function, ast.Attribute) and function.attr in ("no_grad", "inference_mode")


def _operator(node: ast.expr) -> str:
    if isinstance(node, (ast.BinOp, ast.UnaryOp, ast.BoolOp)):
        return type(node.op).__name__
    return type(node.ops[0]).__name__ if isinstance(node, ast.Compare) else type(node).__name__


def _root_name(node: ast.expr) -> str:
    """The name that `a.b[c].d(...)` starts from; "" where it starts from none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_module_path(value: Value) -> bool:
    """Whether a receiver is a Python module such as `torch` or `torch.nn.functional`, and no value."""
    while value.kind == "attribute":
        value = value.operands[0]
    return value.kind == "global"
