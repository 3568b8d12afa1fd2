"""Every op of the package on the device against its reference there, and against itself: equal, and bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import moeca_compile  # noqa: F401  (registers the ops)
from bench.gpu_sections.common import TOLERANCE, WRONG, Bench, Row, relative_error, worst
from moeca_compile._torch_private import has_kernel_for, trace_to_graph
from moeca_compile.ops import attention, bodies, fixed_k, routing, selection, variable_k
from moeca_compile.ops.triton import fallback_refused


@dataclass(frozen=True)
class Sizes:
    samples: int = 8
    tokens: int = 256
    chosen: int = 32
    k: int = 2
    experts: int = 16
    width: int = 384
    hidden: int = 768
    heads: int = 6
    groups: int = 2


TINY = Sizes(samples=2, tokens=16, chosen=4, experts=4, width=8, hidden=12, heads=2)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def registered(function: Callable[..., Tensor], parameters: int) -> str:
    """The key of a body as the passes extract it: of ATen ops, which is what the kernels' planner reads."""
    examples = [torch.zeros(2, 2) for _ in range(1 + parameters)]
    return bodies.register(fx.GraphModule({}, trace_to_graph(function, *examples).graph))


def body() -> str:
    return registered(swiglu, 3)


class Make:
    """Random arguments of the ops on a device."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return value.to(self.dtype)

    def flags(self, share: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device) < share

    def distinct(self, count: int, most: int, *shape: int) -> Tensor:
        """`count` numbers below `most`, all different, at each place."""
        scores = torch.rand(*shape, most, generator=self.generator, device=self.device)
        return scores.argsort(-1)[..., :count]

    def parameters(self) -> list[Tensor]:
        s = self.sizes
        shapes = ((s.hidden, s.width), (s.hidden, s.width), (s.width, s.hidden))
        return [self.normal(*shape, scale=shape[1] ** -0.5) for _ in range(s.experts) for shape in shapes]

    def forecast(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Histories of branches, and the weights of two slots: nine in ten branches have been cached before."""
        history = 1 + self.flags(0.9, *shape).int()
        return history, torch.tensor([[0.0, 1.0], [-0.5, 1.5]], device=self.device)

    def fixed_k_outputs(self) -> tuple[Any, ...]:
        s = self.sizes
        rows = self.normal(s.samples * s.tokens, s.width)
        index = self.distinct(s.k, s.experts, len(rows))
        return [rows], index, self.parameters(), s.experts, body(), s.width

    def refresh_fixed_k(self, share: float = 0.6, forecast: bool = True) -> tuple[Any, ...]:
        s = self.sizes
        slots, by_slot = (s.samples, s.tokens, s.k), (s.samples, s.chosen, s.k)
        return (
            [self.normal(*slots, s.width) for _ in range(1 + forecast)],
            [self.normal(s.samples * s.chosen, s.width)],
            self.distinct(s.k, s.experts, s.samples, s.chosen),
            self.flags(share, *by_slot),
            self.distinct(s.chosen, s.tokens, s.samples),
            self.normal(*slots),
            *(self.forecast(*slots) if forecast else (None, None)),
            self.parameters(),
            s.experts,
            body(),
        )

    def variable_k_outputs(self) -> tuple[Any, ...]:
        s = self.sizes
        count = s.samples * s.tokens
        routed, weight = self.flags(s.k / s.experts, count, s.experts), self.normal(count, s.experts)
        return [self.normal(count, s.width)], routed, weight, None, self.parameters(), body(), s.width, s.k * count

    def refresh_variable_k(self) -> tuple[Any, ...]:
        s = self.sizes
        count, slots = s.samples * s.tokens, s.k * s.samples * s.tokens
        held = self.flags(s.k / s.experts, count, s.experts)
        place = (held.flatten().cumsum(0) * held.flatten()).view_as(held)
        place = torch.where(place <= slots, place, 0).to(torch.int32)
        routed = self.flags(s.k / s.experts, count, s.experts) | (held & self.flags(0.5, count, s.experts))
        mask = routed & ((place == 0) | self.flags(0.2, count, s.experts))
        return (
            [self.normal(slots, s.width) for _ in range(2)],
            [self.normal(count, s.width)],
            place,
            routed,
            mask,
            self.normal(count, s.experts),
            *self.forecast(count, s.experts),
            self.parameters(),
            body(),
        )

    def choose_experts(self) -> tuple[Any, ...]:
        """DSMoE's router, in float32; logits with steps so large that no two scores are nearly equal."""
        s = self.sizes
        logits = self.distinct(s.experts, s.experts, s.samples * s.tokens) * 0.25 - s.experts / 8
        bias = 0.2 * self.normal(s.experts).float()
        groups = s.groups, s.groups // 2, 2, 0.0
        norm = True, routing.SUM, 1e-20, 2.0
        return logits.to(self.dtype), bias, s.k, routing.SIGMOID, *groups, *norm, torch.float32, self.dtype

    def attend_rows(self) -> tuple[Any, ...]:
        s = self.sizes
        head = s.width // s.heads
        caches = [self.normal(s.samples, s.tokens, s.heads, head) for _ in range(2)]
        rows = [self.normal(s.samples, s.heads, s.chosen, head) for _ in range(3)]
        chosen, valid = self.distinct(s.chosen, s.tokens, s.samples), self.flags(0.7, s.samples, s.chosen)
        return *caches, *rows, chosen, valid, None, None, False


OPS: dict[str, Callable[..., Any]] = {
    "fixed_k_outputs": fixed_k.fixed_k_outputs,
    "refresh_fixed_k": fixed_k.refresh_fixed_k,
    "variable_k_outputs": variable_k.variable_k_outputs,
    "refresh_variable_k": variable_k.refresh_variable_k,
    "attend_rows": attention.attend_rows,
    "choose_experts": routing.choose_experts,
}
"""Each op's reference, plain ATen."""


def run(bench: Bench) -> Iterator[None]:
    yield
    sizes = TINY if bench.small else Sizes()
    for dtype in dict.fromkeys((torch.float32, bench.dtype)):
        make = Make(sizes, bench.device, dtype)
        for name, reference in OPS.items():
            check = partial(compared, bench, name, reference, make)
            bench.attempt("ops", f"{name}, {str(dtype).removeprefix('torch.')}", 5, check)
    for rows in (64,) if bench.small else (8192,):
        bench.attempt("ops", f"router of {rows} rows with ties", 5, partial(ties, bench, rows))
        bench.attempt("ops", f"top-k of {rows} rows", 5, partial(selections, bench, rows))


class NoKernelError(RuntimeError):
    """The reference would be compared with itself."""


def kernel(name: str, device: torch.device) -> Callable[..., Any]:
    """What runs an op on the device: its kernel, and never the reference. Raises NoKernelError without one.

    On a CPU it is the same kernel in Triton's interpreter.
    """
    if device.type == "cuda":
        op = getattr(torch.ops.moeca, name)
        if not has_kernel_for(op.default, device):
            raise NoKernelError(f"moeca::{name} has no kernel for CUDA: torch for CUDA and Triton are needed")
        return op
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise NoKernelError("on a CPU, kernels run with TRITON_INTERPRET=1 alone")
    from moeca_compile.ops.triton import attention, fixed_k, routing, variable_k

    return next(getattr(each, name) for each in (attention, fixed_k, routing, variable_k) if hasattr(each, name))


def compared(bench: Bench, name: str, reference: Callable[..., Any], make: Make) -> None:
    """Greatest error of the op over its results and the tensors that it writes to; whether two runs are equal.

    Raises where the op refuses its arguments, since the reference would run in its place.
    """
    op, arguments = kernel(name, bench.device), getattr(make, name)()
    with fallback_refused():
        found, again = (outcome(op, arguments) for _ in range(2))
    wanted = outcome(reference, arguments)
    both = list(zip(found, wanted, strict=True))
    error = worst(relative_error(one, other) for one, other in both if one.is_floating_point())
    right = error <= TOLERANCE[make.dtype] and all(
        torch.equal(*pair) for pair in both if not pair[0].is_floating_point()
    )
    note = "" if right else f"{WRONG}, "
    note += "same bits twice" if all(map(torch.equal, found, again)) else f"{WRONG}: other bits at the second run"
    what = f"{name}, {str(make.dtype).removeprefix('torch.')}"
    bench.emit(Row("ops", what, error, "relative error", note=note))


def selections(bench: Bench, rows: int) -> None:
    """The top-k that routers are compiled to, by Inductor on CUDA, against the same on a CPU: bit by bit."""
    scores = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # with ties
    run = selection.topk if bench.small else torch.compile(selection.topk, dynamic=False)
    found, wanted = run(scores.to(bench.device), 2), selection.topk(scores, 2)
    right = all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))
    note = "" if right else WRONG
    bench.emit(Row("ops", f"top-k of {rows} rows", 1.0 - right, "relative error", note=note))


def ties(bench: Bench, rows: int) -> None:
    """What a router's kernel chooses among equal scores: the lower ids, which torch.topk leaves open."""
    scores = torch.randint(-2, 3, (rows, 16), generator=torch.Generator().manual_seed(0)) / 2
    plain = 4, routing.NONE, 1, 1, 1, 0.0, False, routing.NONE, 0.0, 1.0, torch.float32, torch.float32
    ids, weights = kernel("choose_experts", bench.device)(scores.to(bench.device), None, *plain)
    values, wanted = selection.topk(scores, 4)
    right = torch.equal(ids.cpu(), wanted) and torch.equal(weights.cpu(), values)
    note = "" if right else WRONG
    bench.emit(Row("ops", f"router of {rows} rows with ties", 1.0 - right, "relative error", note=note))


def outcome(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """What a call gives, and its tensor arguments after it; the arguments themselves stay as they are."""
    given = [_copied(value) for value in arguments]
    results = function(*given)
    return [*_tensors([results]), *_tensors(given)]


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
