"""In 16 bits, faults are found at every region, in the rewrite and in compiled code, and rounding raises no alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from examples import families
from moeca_compile.passes.match.regions import Attention, Experts
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.fixed_k_cache import FixedKCache
from moeca_compile.policies.moeca_caches import KeysValues
from tests.lower.low_precision import BATCH, LowPrecision, with_fault, with_wide_intermediates

aten, moeca = torch.ops.aten, torch.ops.moeca
DTYPES = [torch.bfloat16, torch.float16]


@lru_cache
def small(dtype: torch.dtype, recipe: str = "moeca") -> LowPrecision:
    return LowPrecision.of(families.reduced("DSMoE"), dtype, recipe)


def spare(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor with its rows 0, 64, 128... changed; a row is all that belongs to one token."""
    rows = tensor.reshape(16 * BATCH, -1).clone()
    rows[::64] = change(rows[::64])
    return rows.view_as(tensor)


# --- faults of the rewrite ----------------------------------------------------------------------------------------


def wrong_expert(patch: pytest.MonkeyPatch, layer: Experts) -> None:
    """One token in 64 is recomputed by the expert after its own."""
    chosen = FixedKCache._chosen

    def wrong(self: FixedKCache, rows: Tensor) -> Tensor:
        value = chosen(self, rows)
        if self.layer is layer and not value.is_floating_point():
            flat = value.flatten(0, 1)
            flat[::64] = (flat[::64] + 1) % self.layer.body.experts
        return value

    patch.setattr(FixedKCache, "_chosen", wrong)


def swapped_weights(patch: pytest.MonkeyPatch, layer: Experts) -> None:
    combine = FixedKCache._combine_cached
    patch.setattr(
        FixedKCache,
        "_combine_cached",
        lambda self, step, w: combine(self, step, w.flip(-1) if self.layer is layer else w),
    )


def stale_key(patch: pytest.MonkeyPatch, attention: Attention) -> None:
    """The key of one token is that of the token before."""
    store = KeysValues.store

    def wrong(self: KeysValues, step: Any) -> None:
        store(self, step)
        if self.attention is attention:
            keys = step.updates[f"{self.name}.keys"]
            keys[:, 5] = keys[:, 4]

    patch.setattr(KeysValues, "store", wrong)


def off_by_one(patch: pytest.MonkeyPatch, region: Any) -> None:
    """A token gets the row of the one before."""
    node, read = region.residual.output if isinstance(region, Attention) else region.output, Cached.read
    patch.setattr(
        Cached, "read", lambda self, step: read(self, step).roll(1, 1) if self.node is node else read(self, step)
    )


def planted(model: LowPrecision) -> Iterator[tuple[Callable[..., None], Any]]:
    regions = model.compiled.regions
    yield from ((fault, layer) for fault in (wrong_expert, swapped_weights) for layer in regions.experts)
    yield from ((fault, attention) for fault in (stale_key, off_by_one) for attention in regions.attentions)
    yield from ((off_by_one, feedforward) for feedforward in regions.feedforwards)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_of_the_rewrite_is_found_and_named_at_every_region(dtype, recwarn):
    model = small(dtype)
    for fault, region in planted(model):
        with pytest.MonkeyPatch.context() as patch:
            fault(patch, region)
            found, _ = model.regions()
        assert [skipped.name for skipped in found.skipped] == [region.name], f"{fault.__name__} in {region.name}"
    found, notes = model.regions()
    assert not found.skipped and not notes.warnings


# --- faults of compiled code ---------------------------------------------------------------------------------------


def at(target: fx.Node, change: Callable[[Any, Sequence[Any]], Any]) -> Callable[..., Any]:
    return lambda node, value, arguments: change(value, arguments) if node is target else value


def code_faults(nodes: Sequence[fx.Node], experts: int) -> Iterator[tuple[str, Any]]:
    """Faults by name, one for each place in a step where there can be one."""
    for node in nodes:
        if node.target is moeca.fixed_k_outputs.default:
            index = node.args[1]
            yield "wrong expert", at(index, lambda v, _: spare(v, lambda row: (row + 1) % experts))
            yield "row off by one", at(node, lambda v, _: v.roll(1, 0))
        if node.target is aten.sum.dim_IntList and node.meta["val"].shape[-1] == 32 and _is_product(node.args[0]):
            weighted = node.args[0]
            yield "swapped weights", at(weighted, lambda _, args: args[0] * args[1].flip(-2))
        if node.target is aten.mul.Tensor and _is_gate(node):
            yield "missing gate", at(node, lambda _, args: next(a for a in args if a.shape[1] > 1).clone())


def _is_product(node: Any) -> bool:
    return node.target is aten.mul.Tensor and node.meta["val"].ndim >= 3


def _is_gate(node: fx.Node) -> bool:
    """A product of tokens with one row a sample, added to the stream."""
    shapes = sorted(tuple(arg.meta["val"].shape) for arg in node.all_input_nodes)
    added = any(user.target is aten.add.Tensor for user in node.users)
    return added and shapes == [(BATCH, 1, 32), (BATCH, 16, 32)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_of_compiled_code_is_found_wherever_it_is(dtype, recwarn):
    model, seen = small(dtype), set()
    step = model.step(StepKind(), with_wide_intermediates)
    for name, change in code_faults(list(step.traced.graph.graph.nodes), experts=8):
        sound, notes = model.same(StepKind(), model.step_like(step, with_fault(change)), seed=1)
        assert not sound and "Inductor" in notes.warnings[0], name
        seen.add(name)
    assert seen == {"wrong expert", "row off by one", "swapped weights", "missing gate"}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "stack"])
def test_code_that_rounds_elsewhere_raises_no_alarm(dtype, recipe, recwarn):
    model = small(dtype, recipe)
    for kind in model.kinds():
        step = model.step(kind, with_wide_intermediates)
        for seed in range(3):
            sound, notes = model.same(kind, step, seed)
            assert sound, notes.warnings
            assert not notes.warnings
