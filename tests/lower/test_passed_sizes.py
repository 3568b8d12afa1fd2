"""A rewrite that passed validation at two batch sizes is not validated at a third, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moeca_compile
from moeca_compile import backend
from moeca_compile.lower.passed_sizes import PassedSizes, SizedGraph
from tests.harness import own_warnings
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")


def graph(size: int, *numbers: int, key: str = "key") -> SizedGraph:
    return SizedGraph(key, (*numbers, size, 3), (len(numbers),), (len(numbers) + 1,))


def passed(*graphs: SizedGraph) -> PassedSizes:
    found = PassedSizes()
    for each in graphs:
        found.note(each)
    return found


def test_a_third_size_on_the_line_is_covered() -> None:
    found = passed(graph(2, 8, 5), graph(4, 16, 5))
    assert found.cover(graph(3, 12, 5)) and found.cover(graph(64, 256, 5))


@pytest.mark.parametrize(
    "other",
    [graph(3, 13, 5), graph(3, 12, 6), graph(3, 12, 5, key="other"), graph(3, 12, 5, 7), graph(1, 4, 5), None],
    ids=["off the line", "another number", "another graph", "more numbers", "a size of one", "no form"],
)
def test_no_other_is(other: SizedGraph | None) -> None:
    assert not passed(graph(2, 8, 5), graph(4, 16, 5)).cover(other)


def test_no_other_size_than_that_of_the_batch_counts() -> None:
    """Where pictures of 4 and 8 passed, one of 6 is square for all that is known."""

    def picture(side: int) -> SizedGraph:
        return SizedGraph("key", (2 * side, 2, side, side, 1), (1,), (2,))

    assert not passed(picture(4), picture(8)).cover(picture(6))


def test_neither_does_one_size_do_nor_the_same_twice() -> None:
    assert not passed(graph(2, 8), graph(2, 8), None).cover(graph(3, 12))


def sizes(model: TinyDiTMoE, compiled: Any, *batches: int) -> None:
    for batch in batches:
        x, y = make_inputs(model, batch)
        with torch.no_grad():
            compiled(x, torch.ones(batch), y)


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes at which a rewrite was validated."""
    found: list[int] = []
    sound = backend.sound_regions

    def noted(graph: Any, regions: Any, config: Any, inputs: Any, notes: Any) -> Any:
        found.append(next(len(v) for v in inputs if isinstance(v, torch.Tensor) and v.dtype == torch.int64))
        return sound(graph, regions, config, inputs, notes)

    monkeypatch.setattr(backend, "sound_regions", noted)
    return found


def compiled(model: TinyDiTMoE) -> Any:
    return torch.compile(model, backend="moeca", options={"recipe": "moeca", "lowering": "eager"})


def test_a_model_is_validated_at_two_sizes(validations: list[int]) -> None:
    model = make_model(SMALL)
    fast = compiled(model)
    sizes(model, fast, 1, 2, 3, 5, 4)
    assert validations == [1, 2, 3]
    assert not own_warnings(moeca_compile.report(fast))


def test_what_did_not_pass_counts_for_nothing(validations: list[int]) -> None:
    model = make_model(SMALL)
    for parameter in model.blocks[1].parameters():
        parameter.data.zero_()  # all values are the same, which shows nothing
    with pytest.warns(UserWarning, match="same value for all tokens"):
        sizes(model, compiled(model), 2, 3, 4)
    assert sorted(set(validations)) == [2, 3, 4]


def test_weights_that_hide_faults_are_another_graph(validations: list[int]) -> None:
    model = make_model(SMALL)
    fast = compiled(model)
    sizes(model, fast, 2, 3)
    model.blocks[1].adaLN_modulation[-1].bias.data.fill_(0.5)
    sizes(model, fast, 4)
    assert validations == [2, 3, 4]
