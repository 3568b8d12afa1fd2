"""For methods that do more than dispatch, such as a whole `forward` with its router.

The method is traced as it is written but for its dispatch, which becomes the marker ops (rewriting.py). The
check runs the original and the rewritten method on random arguments; in the rewritten one the dispatch is the
marker ops' meaning, as a plain loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.utils._pytree import tree_leaves

from moeca_compile.capture.dataflow import Flow
from moeca_compile.capture.idioms.base import Facts, Layout, Paths, Trusted
from moeca_compile.capture.idioms.routed import tensor_at
from moeca_compile.capture.numerics import (
    NoExpertsError,
    UntrustedError,
    close,
    require_row_wise,
    tolerance_for,
    with_random_parameters,
)
from moeca_compile.capture.rewriting import Rewritten, rewritten
from moeca_compile.capture.site import IndexOf, ItemsOf, find_site, loop_items
from moeca_compile.capture.source import Method
from moeca_compile.capture.structure import (
    Path,
    alive,
    named_tensors,
    structure,
    tensor_paths,
    unlike,
)
from moeca_compile.ops import markers  # noqa: F401  (defines the ops)

TRIAL_SEED = 0
TRIAL_SIZE = 3  # of a dimension that varies from call to call
# The experts' part in what a method returns has to be so many times the tolerance for the check to see a fault.
SEEN = 3.0
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

Body = Callable[..., Tensor]


@dataclass(frozen=True)
class Inline:
    """A method whose dispatch was found and rewritten; `parameters` are its own, in order, without self."""

    method: Rewritten
    parameters: tuple[str, ...]

    def facts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts | str:
        """Traceable: what kind of argument each is, or why a call is not supported."""
        given: list[tuple[Any, ...]] = []
        for key, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor):
                sizes = [len(range(size)) if has_static_value(size) else None for size in value.shape]
                if 0 in sizes:
                    return "an argument has no rows"
                given.append((key, True, tuple(sizes), value.dtype, value.device))
            elif value is None or isinstance(value, (bool, int, float, str)):
                given.append((key, False, value))
            else:
                return f"one of its arguments is a {type(value).__name__}, neither a tensor nor a number"
        return tuple(given)

    def layout(self, module: nn.Module) -> Layout:
        items, shared = self._held(module)
        counts = {_count(item) for item in items}
        if len(counts) != 1 or 0 in counts:
            raise UntrustedError("self holds no experts, or not as many of one kind as of another")
        paths = tuple(_item_paths(item) for item in items) + tuple(_shared_paths(each, module) for each in shared)
        structures = tuple(_structure(item[0]) for item in items) + tuple(_structure(each) for each in shared)
        return Layout(paths, (counts.pop(), structures))

    def compared(self, original: Callable[..., Any], module: nn.Module, facts: Facts) -> torch.dtype:
        devices = [fact[4] for fact in facts if fact[1]]
        tolerance = tolerance_for([*module.parameters(), *self._tensors(facts)])
        trials = list(self._trials(facts, _count(self._held(module)[0][0])))
        if not devices:
            raise UntrustedError("none of its arguments is a tensor")
        for candidate in (lambda: module, lambda: with_random_parameters(module)):
            layer = candidate()
            verdicts = [self._compared_once(original, layer, *trial, tolerance) for trial in trials]
            if all(verdict is not None for verdict in verdicts):
                return verdicts[0]  # type: ignore[return-value]
        raise UntrustedError("its experts hardly change what it returns, so nothing can be told from numbers")

    def equivalent(self, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Traceable: what the method returns, its dispatch as marker ops."""
        return self.method.function(_Markers(*trusted, self.method.may_miss), module, *args, **kwargs)

    def _held(self, module: nn.Module) -> tuple[list[Any], list[Any]]:
        """What the attributes hold: the experts' own, and what they share."""
        try:
            items, shared = (
                [attrgetter(n)(module) for n in names] for names in (self.method.items, self.method.shared)
            )
        except AttributeError as error:
            raise UntrustedError(f"an attribute that its experts read is missing: {error}") from error
        return items, shared

    # the comparison

    def _compared_once(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        args: list[Any],
        kwargs: dict[str, Any],
        tolerance: float,
    ) -> torch.dtype | None:
        """The dispatch's dtype; None if the numbers cannot tell. Raises UntrustedError where they differ."""
        want = _without_side_effects(original, module, args, kwargs)
        for dtype_of in ("accumulator", "product", "branch"):
            meaning = _Meaning(dtype_of, 1.0, tolerance)
            got = tree_leaves(self.method.function(meaning, module, *_cloned(args), **kwargs))
            if [_kind(each) for each in got] == [_kind(each) for each in want]:
                break
        else:
            raise UntrustedError("it returns another shape or type than its experts' weighted outputs have")
        if not all(_equal(a, b, tolerance) for a, b in zip(got, want, strict=True)):
            raise UntrustedError("its result is not the sum of its experts' weighted outputs")
        without = _Meaning(dtype_of, 0.0, tolerance)
        rest = tree_leaves(self.method.function(without, module, *_cloned(args), **kwargs))
        told = any(not _equal(a, b, SEEN * tolerance) for a, b in zip(rest, want, strict=True))
        return meaning.dtype if told and all(_finite(each) for each in want) else None

    def _trials(self, facts: Facts, num_experts: int) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Random arguments; then tokens that are all the same, so that most experts get none."""
        for same in (False, True):
            generator = torch.Generator().manual_seed(TRIAL_SEED)
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            for key, is_tensor, *described in facts:
                value: Any = described[0]
                if is_tensor:
                    ids = self._name(key) == self.method.index
                    value = _random(described, num_experts if ids else None, same, generator)
                if isinstance(key, int):
                    args.append(value)
                else:
                    kwargs[key] = value
            yield args, kwargs

    def _name(self, key: int | str) -> str | None:
        if isinstance(key, str):
            return key
        return self.parameters[key] if key < len(self.parameters) else None

    def _tensors(self, facts: Facts) -> list[Tensor]:
        return [torch.empty(0, dtype=fact[3], device=fact[4]) for fact in facts if fact[1]]


def recognised(
    method: Method, flow: Flow, index_of: IndexOf, items_of: ItemsOf = loop_items, dense: bool = False
) -> Inline | None:
    """The dispatch in `method`, found by site.py and rewritten, None where there is none that is understood."""
    site = find_site(flow, method.tree, index_of, items_of, dense)
    found = rewritten(site, method.function) if site else None
    return Inline(found, flow.parameters) if found else None


# What is traced


class _Shapes:
    """How the body of one expert sees rows and items (rewriting.py). Traceable."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return _as_matrix(a) @ _as_matrix(b)

    def einsum(self, equation: str, a: Tensor, b: Tensor) -> Tensor:
        """The same; as a product of matrices where it is one, which later passes follow row by row."""
        inputs, _, out = equation.replace(" ", "").partition("->")
        of_a, _, of_b = inputs.partition(",")
        matrix = of_b[-2:]
        turned = matrix[1:] == of_a[-1:]
        kept = [letter for letter in out[:-1] if letter in of_a]
        plain = of_a[-1:] in matrix and out[-1:] == matrix.replace(of_a[-1:], "") and kept == list(of_a[:-1])
        if not plain or "." in equation or any([size != 1 for size in b.shape[:-2]]):
            return torch.einsum(equation, a, b)
        b = b.reshape(b.shape[-2:])
        product = a @ (b.t() if turned else b)
        sizes = [product.shape[of_a.index(letter)] if letter in of_a else 1 for letter in out[:-1]]
        return product.reshape(*sizes, product.shape[-1])

    def rows(self, rows: Tensor, dims: int) -> Tensor:
        return rows if dims == 2 else rows.reshape(rows.shape[0], *[1] * (dims - 2), rows.shape[1])

    def item(self, item: Tensor, dims: int) -> Tensor:
        return item.reshape(*[1] * dims, *item.shape)


def _as_matrix(value: Tensor) -> Tensor:
    """One expert's matrix without its leading dimensions of size 1: a product with it is one of matrices."""
    leading = value.shape[:-2]
    return value.reshape(value.shape[-2:]) if len(leading) and all([size == 1 for size in leading]) else value


class _Markers(_Shapes):
    """The dispatch as marker ops. Traceable. may_miss: whether there may be ids that are no expert's."""

    def __init__(self, paths: Paths, dtype: torch.dtype, may_miss: bool) -> None:
        self.paths, self.dtype, self.may_miss = paths, dtype, may_miss

    def experts(
        self,
        like: Any,
        rows: tuple[Tensor, ...],
        index: Tensor,
        weight: Tensor,
        body: Body,
        items: tuple[Any, ...],
        shared: tuple[Any, ...],
    ) -> Tensor:
        flat = [_flat(each) for each in rows]
        index, weight = _branches(flat[0], index, weight)
        firsts = [item[0] for item in items]
        entered = [torch.ops.moeca.expert_rows(each) for each in flat]
        body_out = body(*entered, *firsts, *shared)
        if body_out.dim() != 2:
            body_out = body_out.reshape(flat[0].shape[0], body_out.shape[-1])
        num_experts = _count(items[0])
        params = []
        for number in range(num_experts):
            # The body's own nodes have to be those in params: an item is looked up once.
            own = firsts if number == 0 else [item[number] for item in items]
            for item, its_paths in zip([*own, *shared], self.paths, strict=True):
                params.extend([tensor_at(item, path) for path in its_paths])
        index = index.to(torch.int64) if index.dtype != torch.int64 else index
        if self.may_miss:
            taken = (index >= 0) & (index < num_experts)
            index, weight = torch.where(taken, index, 0), torch.where(taken, weight, 0)
        out = torch.ops.moeca.experts(flat[0], index, weight, body_out, params, num_experts)
        out = out.to(self.dtype) if out.dtype != self.dtype else out
        return _shaped(out, like, rows[0])


def _flat(rows: Tensor) -> Tensor:
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def _branches(x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights as (T, k); weights (T, experts) become those of the ids."""
    tokens = x.shape[0]
    index, weight = (each.reshape(tokens, len(range(each.numel() // tokens))) for each in (index, weight))
    if weight.shape[1] != index.shape[1]:
        weight = weight.gather(1, index.to(torch.int64))
    return index, weight


def _shaped(out: Tensor, like: Any, rows: Tensor) -> Tensor:
    if isinstance(like, Tensor):
        return out if like.dim() == 2 else out.reshape(like.shape)
    return out if rows.dim() == 2 else out.reshape(*rows.shape[:-1], out.shape[-1])


def _count(item: Any) -> int:
    return item.shape[0] if isinstance(item, Tensor) else len(item)


# What a layer holds


def _item_paths(item: Any) -> tuple[Path, ...]:
    if isinstance(item, Tensor):
        return ((),)
    if isinstance(item, nn.ParameterList) and len({_structure(each) for each in item}) == 1:
        return ((),)
    if isinstance(item, nn.ModuleList) and len(item):
        reason = unlike(item)
        if reason:
            raise UntrustedError(reason)
        return tensor_paths(item[0])
    raise NoExpertsError


def _shared_paths(shared: Any, layer: nn.Module) -> tuple[Path, ...]:
    if isinstance(shared, Tensor):
        return ((),)
    if isinstance(shared, nn.Module):
        reason = alive(shared)
        if reason:
            raise UntrustedError(f"what its experts share {reason}")
        return tensor_paths(shared)
    if getattr(shared, "__self__", None) is layer:
        raise UntrustedError("its experts' code calls a method of the layer")
    return ()


def _structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return structure(value) if isinstance(value, nn.Module) else repr(type(value))


# What is compared


class _Meaning(_Shapes):
    """The marker ops' meaning as a plain loop; `dtype` is that of its last result.

    dtype_of: which dtype the result takes, that of what the original adds up in, of its summands, or of branches
    scale: what the result is multiplied by
    """

    def __init__(self, dtype_of: str, scale: float, tolerance: float) -> None:
        self.dtype_of, self.scale, self.tolerance = dtype_of, scale, tolerance
        self.dtype: torch.dtype | None = None

    def experts(
        self,
        like: Any,
        rows: tuple[Tensor, ...],
        index: Tensor,
        weight: Tensor,
        body: Body,
        items: tuple[Any, ...],
        shared: tuple[Any, ...],
    ) -> Tensor:
        _require_closed(body)
        if index.dtype not in _INDEX_DTYPES:
            raise UntrustedError("what it takes expert ids from is no tensor of integers")
        flat = [_flat(each) for each in rows]
        if len({len(each) for each in flat}) != 1:
            raise UntrustedError("its experts' inputs have different numbers of rows")
        index, weight = _branches(flat[0], index, weight)
        first = _Expert(body, [item[0] for item in items], shared)
        require_row_wise(first, flat, first.tensors, self.tolerance)
        out = torch.zeros(0)
        for number in range(_count(items[0])):
            token, slot = torch.where(index == number)
            branch = first.with_parameters_of([item[number] for item in items], [each[token] for each in flat])
            if number == 0:
                dtype = torch.promote_types(branch.dtype, weight.dtype)
                wide = torch.promote_types(dtype, torch.float32)
                out = branch.new_zeros(len(flat[0]), branch.shape[-1], dtype=wide)
            out.index_add_(0, token, branch.to(out.dtype) * weight[token, slot, None].to(out.dtype))
        if self.dtype_of == "accumulator" and isinstance(like, Tensor):
            dtype = like.dtype
        elif self.dtype_of == "branch":
            dtype = branch.dtype
        self.dtype = dtype
        return _shaped((self.scale * out).to(dtype), like, rows[0])


class _Expert:
    """A body with a copy of one expert's items, in which the parameters of another can be put."""

    def __init__(self, body: Body, items: Sequence[Any], shared: Sequence[Any]) -> None:
        self.body, self.shared = body, shared
        self.items = _Items(copy.deepcopy(list(items)))

    def __call__(self, *rows: Tensor) -> Tensor:
        out = self.body(*rows, *self.items.given(), *self.shared)
        return out.reshape(len(rows[0]), out.shape[-1]) if isinstance(out, Tensor) and out.dim() > 2 else out

    def with_parameters_of(self, items: Sequence[Any], rows: Sequence[Tensor]) -> Tensor:
        """Its own code with the parameters and buffers of another expert's items."""
        out: Tensor = functional_call(self.items, dict(named_tensors(_Items(items))), (self, *rows))
        return out

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for _, tensor in named_tensors(self.items))


class _Items(nn.Module):
    """One expert's items as one module: tensors as buffers. Called with a function of rows, it calls that."""

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__()
        self.count = len(items)
        for number, item in enumerate(items):
            if isinstance(item, nn.Module):
                self.add_module(f"item_{number}", item)
            else:
                self.register_buffer(f"item_{number}", item.detach())

    def forward(self, expert: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        return expert(*rows)

    def given(self) -> list[Any]:
        return [getattr(self, f"item_{number}") for number in range(self.count)]


def _require_closed(body: Body) -> None:
    for cell in getattr(body, "__closure__", None) or ():
        if isinstance(cell.cell_contents, (Tensor, nn.Module)):
            raise UntrustedError("its experts read a tensor that is neither theirs nor one of rows")


def _random(described: Sequence[Any], num_experts: int | None, same: bool, generator: torch.Generator) -> Tensor:
    """A random argument of (sizes, dtype, device); expert ids if there is a number of experts.

    same: all tokens are alike, or, for expert ids, the experts but one are used.
    """
    sizes, dtype, device = described
    shape = [TRIAL_SIZE if size is None else size for size in sizes]
    count = torch.Size(shape).numel()
    if num_experts is not None:
        spare = num_experts > 1 and (len(shape) < 2 or shape[-1] < num_experts)
        order = torch.randperm(num_experts, generator=generator)[: num_experts - 1 if same and spare else None]
        return order[torch.arange(count) % len(order)].reshape(shape).to(device, dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(device, dtype)
    value = torch.randn(shape, generator=generator)
    if same and len(shape) > 1:
        value = value.reshape(-1, shape[-1])[:1].expand(count // shape[-1], -1).reshape(shape).clone()
    return value.to(device, dtype)


def _without_side_effects(
    original: Callable[..., Any], module: nn.Module, args: list[Any], kwargs: dict[str, Any]
) -> list[Any]:
    """What the original returns. Raises UntrustedError, with the buffers as before, if it changes them."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    result = original(module, *_cloned(args), **kwargs)
    changed = [(buffer, old) for buffer, old in before if not torch.equal(buffer, old)]
    for buffer, old in changed:
        buffer.copy_(old)
    if changed:
        raise UntrustedError("it changes its own buffers")
    return tree_leaves(result)


def _cloned(args: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in args]


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def _equal(got: Any, want: Any, tolerance: float) -> bool:
    if not isinstance(got, Tensor):
        return bool(got == want)
    return close(got, want, tolerance) if got.dtype.is_floating_point else torch.equal(got, want)


def _finite(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or bool(leaf.isfinite().all())
