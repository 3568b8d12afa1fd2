"""Parts that are compiled already are not compiled again, at whatever batch size they are needed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import moeca_compile
from moeca_compile._torch_private import trace_to_graph
from moeca_compile.lower import parts as module
from moeca_compile.lower.partition import Subgraph, whole_graph
from moeca_compile.lower.parts import Parts
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.record import find_record
from tests.harness import own_warnings, replace_inductor
from tests.lower.test_sizes import first_rows
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model

Function = Callable[..., list[Tensor]]
WEIGHT = torch.randn(6, 8)


def layer(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Tokens of all samples are rows of one product, as in an MoE layer."""
    batch, tokens, width = x.shape
    rows = (x + 1).reshape(batch * tokens, width) @ weight
    return [rows.reshape(batch, tokens, -1).sin(), rows[: batch * 2]]


def part(function: Function, batch: int, *shape: int) -> tuple[Subgraph, tuple[Tensor, Tensor]]:
    inputs = torch.randn(batch, *(shape or (4, 6))), WEIGHT
    (call,) = whole_graph(trace_to_graph(function, *inputs))
    return call.subgraph, inputs


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, in order; without Inductor, and so in no time."""
    replace_inductor(monkeypatch)
    found: list[str] = []
    one, all_sizes = module.compile_graph, module.compile_for_sizes
    monkeypatch.setattr(module, "compile_graph", lambda *a, **k: found.append("one size") or one(*a, **k))
    monkeypatch.setattr(module, "compile_for_sizes", lambda *a: found.append("all sizes") or all_sizes(*a))
    return found


def compiled(parts: Parts, function: Function, *batches: int, random: bool = False) -> list[Any]:
    """The code at these batch sizes, each of which gives what the function does."""
    codes = []
    for batch in batches:
        subgraph, inputs = part(function, batch)
        codes.append(parts.code(subgraph, random, True))
        torch.testing.assert_close(list(codes[-1](*inputs)), function(*inputs))
    return codes


@pytest.mark.smoke
def test_the_code_of_the_second_size_is_that_of_all_later_ones() -> None:
    parts = Parts()
    one, second, third, fourth = compiled(parts, layer, 4, 2, 5, 16)
    assert parts.compiled == 2
    assert second.func is third.func is fourth.func is not one
    assert [bool(parts.for_all_sizes(code)[0]) for code in (one, second)] == [False, True]


def test_equal_parts_are_compiled_once(kinds: list[str]) -> None:
    codes = compiled(Parts(), layer, 3, 3)
    assert codes[0] is codes[1] and kinds == ["one size"]


def test_a_size_of_one_is_a_graph_of_its_own(kinds: list[str]) -> None:
    codes = compiled(Parts(), layer, 1, 2, 3, 1, 4)
    assert kinds == ["one size", "one size", "all sizes"]
    assert codes[0] is codes[3] and codes[2].func is codes[4].func


def rounded(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Three of every eight samples: no whole number for each."""
    return [(x @ weight)[: -(-len(x) * 3 // 8)]]


def test_what_is_no_multiple_is_compiled_for_each_size(kinds: list[str]) -> None:
    codes = compiled(Parts(), rounded, 8, 16, 4)
    assert kinds == ["one size"] * 3 and len(set(map(id, codes))) == 3


def capped(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [(x @ weight)[: min(len(x), 6)]]


def test_a_third_size_at_which_a_number_is_another_is_compiled_by_itself(kinds: list[str]) -> None:
    codes = compiled(Parts(), capped, 4, 5, 7, 6)
    assert kinds == ["one size", "all sizes", "one size"] and codes[1].func is codes[3].func is not codes[2]


def test_another_shape_of_the_same_ops_is_no_batch_size(kinds: list[str]) -> None:
    parts, kept = Parts(), []
    for batch, shape in ((2, (4, 6)), (3, (5, 6))):
        subgraph, inputs = part(layer, batch, *shape)
        kept.append(parts.code(subgraph, False, True))
        torch.testing.assert_close(list(kept[-1](*inputs)), layer(*inputs))
    assert kinds == ["one size"] * 2


def test_what_another_process_compiles_is_compiled_here_as_it_is_there(kinds: list[str]) -> None:
    """Jobs that are handed over before the first is done rest on what that one will have compiled."""
    here, there, kept = Parts(), Parts(), []

    def handed_over(batch: int) -> None:
        subgraph, _ = part(layer, batch)
        ((_, families),) = here.missing([subgraph], False)
        here.note(subgraph, False)
        if families:
            there.note(subgraph, False, families)
        kept.append(there.code(subgraph, False, True))

    here.note(part(layer, 9)[0], False)  # as another number of recomputed tokens is noted
    for batch in (4, 2, 7):
        handed_over(batch)
    assert kinds == ["all sizes"]
    found = compiled(here, layer, 4, 2, 7)
    assert kinds == ["all sizes"] * 2 and found[0].func is found[1].func is found[2].func


def test_a_part_that_joins_no_family_that_is_known_is_said_to(kinds: list[str]) -> None:
    """A batch of one is known, and never of the family of others."""
    parts = Parts()
    kept = compiled(parts, layer, 1)
    assert kept and parts.joins(part(layer, 1)[0], False) and not parts.joins(part(layer, 3)[0], False)
    kept += compiled(parts, layer, 3)
    assert parts.joins(part(layer, 5)[0], False)


@pytest.mark.parametrize("fault", ["a guard", "an error"])
def test_what_does_not_hold_for_a_size_is_compiled_for_it(
    fault: str, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def for_sizes(gm: Any, *_: Any) -> Any:
        if fault == "an error":
            raise RuntimeError(fault)
        return gm, lambda sizes: sizes != (5,)

    monkeypatch.setattr(module, "compile_for_sizes", for_sizes)
    codes = compiled(Parts(), layer, 2, 3, 5, 6)
    assert kinds == ["one size"] * (2 if fault == "a guard" else 4)
    alike = [getattr(codes[at], "func", None) for at in (1, 3)]
    assert (alike[0] is alike[1] is not None) == (fault == "a guard")


def first_ten(x: Tensor, weight: Tensor) -> list[Tensor]:
    """There are ten rows from a batch of 3 on."""
    return [(x.reshape(-1, x.shape[-1])[:10] @ weight) + 1]


@pytest.mark.smoke
@pytest.mark.parametrize("state", ["cold", "from disk"])
def test_what_the_code_was_specialized_for_is_asked(state: str) -> None:
    """Inductor's code may hold for some sizes alone, and is not asked for at others, wherever it comes from."""
    with fresh_cache():
        if state == "from disk":
            assert len(compiled(Parts(), first_ten, 4, 5)) == 2
            torch._dynamo.reset()
        parts = Parts()
        first, second, third, small = compiled(parts, first_ten, 4, 5, 16, 2)
        assert first is not second.func is third.func is not small
        assert parts.compiled == 3


def test_code_for_two_sizes_serves_any() -> None:
    """Tokens that a step recomputes, and samples; no input has the number of the former."""

    def code(parts: Parts, samples: int, kept: int) -> Any:
        inputs = torch.randn(samples, 32, 6), WEIGHT
        (call,) = whole_graph(trace_to_graph(lambda *tensors: first_rows(*tensors, kept), *inputs))
        found = parts.code(call.subgraph, False, True)
        torch.testing.assert_close(list(found(*inputs)), first_rows(*inputs, kept))
        return found

    points = [(2, 3), (2, 5), (4, 5), (7, 4), (3, 16), (6, 2), (5, 32)]
    with fresh_cache():
        for _ in ("cold", "from disk"):
            torch._dynamo.reset()
            parts = Parts()
            _, first, *others = [code(parts, *point) for point in points]
            assert parts.compiled == 3
            assert first.args == (5,) and [each.args for each in others] == [(k, s) for s, k in points[2:]]


def test_other_global_modes_are_other_code(kinds: list[str]) -> None:
    parts = Parts()
    kept = compiled(parts, layer, 3)
    torch.set_default_dtype(torch.float64)
    try:
        kept += [parts.code(part(layer, 3)[0], False, True)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert kinds == ["one size"] * 2 and kept[0] is not kept[1]


def test_code_that_nothing_calls_is_forgotten(kinds: list[str]) -> None:
    parts = Parts()
    compiled(parts, layer, 3)
    gc.collect()
    compiled(parts, layer, 3)
    assert kinds == ["one size"] * 2


def test_random_numbers_of_eager_mode_are_other_code(kinds: list[str]) -> None:
    parts = Parts()
    kept = [compiled(parts, layer, 3, random=random) for random in (False, True)]
    assert kept and kinds == ["one size"] * 2


def test_all_sizes_can_be_declined(kinds: list[str]) -> None:
    parts, kept = Parts(), []
    for batch in (2, 3, 4):
        kept.append(parts.code(part(layer, batch)[0], False, False))
    assert kinds == ["one size"] * 3


@pytest.mark.slow  # 20 s: cache steps of all capacities, below, have a third size too
@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [{"recipe": "moeca", "budget": 1 / 8}, {"recipe": "stack-forecast"}], ids=str)
def test_a_third_batch_size_of_a_model_compiles_nothing(options: dict[str, Any], kinds: list[str]) -> None:
    model = make_model(SMALL)
    fast, plain = (
        torch.compile(model, backend="moeca", options={**options, "full_every": 2, **more})
        for more in ({}, {"lowering": "eager", "max_shapes": 5})
    )
    for batch in (2, 3, 5, 4):
        if batch == 5:
            before = len(kinds)
        x, y = make_inputs(model, batch)
        with torch.no_grad():
            for step in range(4):
                given = x, torch.full((batch,), 1.0 - step / 4), y
                torch.testing.assert_close(fast(*given), plain(*given))
    assert len(kinds) == before and "all sizes" in kinds
    assert not own_warnings(moeca_compile.report(fast))


def loop_of(model: TinyDiTMoE) -> StepLoop:
    """The loop of the last input shapes."""
    record = find_record(None, model)
    assert record is not None
    return list(record.engines[-1].loops.values())[-1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dynamic_batch", [None, False])
def test_cache_steps_of_all_capacities_are_compiled_once(dynamic_batch: bool | None, kinds: list[str]) -> None:
    """The first one with a capacity compiles for all but that of all tokens, also at the second batch size."""
    options = {"recipe": "moeca", "full_every": 100, "capacities": (1 / 8, 1 / 4, 1 / 2, 1)}
    models = [make_model(SMALL), make_model(SMALL)]
    fast, plain = (
        torch.compile(model, backend="moeca", options={**options, **more})
        for model, more in zip(models, ({"dynamic_batch": dynamic_batch}, {"lowering": "eager"}), strict=True)
    )

    def step(x: Tensor, y: Tensor, time: float, capacity: int | None = None) -> int:
        """How many parts are compiled at a step with this capacity; None for a full one."""
        before = len(kinds)
        for model in models if capacity is not None else ():
            for stream in loop_of(model).streams.held():
                stream.capacity = capacity
        given = x, torch.full((len(x),), time), y
        with torch.no_grad():
            torch.testing.assert_close(fast(*given), plain(*given))
        return len(kinds) - before

    firsts, later = [], []
    for batch in (2, 3, 5):
        x, y = make_inputs(models[0], batch)
        before = len(kinds)
        step(x, y, 1.0), step(x, y, 0.95)  # until the direction of time is known
        *capacities, _ = loop_of(models[0]).compiled.plan.capacities
        step(x, y, 0.9, capacities[0])
        firsts.append(len(kinds) - before)
        later += [step(x, y, 0.8 - 0.1 * at, capacity) for at, capacity in enumerate(capacities[1:])]
        assert {kind.capacity for kind in loop_of(models[0]).steps} == {0, *capacities}
    assert len(later) > 3 and not own_warnings(moeca_compile.report(fast))
    if dynamic_batch is False:
        assert all(firsts) and all(later)
    else:
        assert firsts[0] and not firsts[2] and not any(later)
