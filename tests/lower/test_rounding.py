"""Errors by row; what is rounding and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from moeca_compile.lower.rounding import ValidationError, allowed_error, compare, row_errors, unit, with_noise

CPU = torch.device("cpu")
Trial = Callable[[torch.Generator], list[Tensor]]


def rows(dtype: torch.dtype = torch.bfloat16, count: int = 128) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def shaken(value: Tensor, amount: float, flipped: int = 0) -> Trial:
    """Trials that move every row by about `amount`, and the first `flipped` rows to other values."""

    def trial(generator: torch.Generator) -> list[Tensor]:
        noise = 1 + amount * torch.randn(value.shape, generator=generator)
        moved = (value * noise).to(value.dtype)
        moved[:flipped] = torch.randn(flipped, 64, generator=generator).to(value.dtype)
        return [moved]

    return trial


def test_the_error_of_a_row_is_relative_to_the_row():
    wanted = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    found = wanted + torch.tensor([[0.0, 0.5], [0.05, 0.0]])
    assert row_errors(found, wanted).tolist() == pytest.approx([0.1, 0.1])


def test_a_row_of_almost_nothing_is_held_against_the_whole_tensor():
    wanted = torch.cat([torch.ones(99, 4), torch.full((1, 4), 1e-6)])
    found = wanted.clone()
    found[-1] = 2e-6
    assert float(row_errors(found, wanted)[-1]) < 1e-4


def test_rows_of_integers_are_equal_or_wrong():
    wanted = torch.arange(6).view(3, 2)
    assert row_errors(wanted + torch.tensor([[0, 0], [0, 1], [0, 0]]), wanted).tolist() == [0, 1, 0]


def test_equal_infinities_and_nans_do_not_differ_and_others_are_infinitely_wrong():
    wanted = torch.tensor([[1.0, float("inf")], [1.0, float("nan")], [1.0, 1.0]])
    assert row_errors(wanted.clone(), wanted).tolist() == [0, 0, 0]
    found = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, float("nan")]])
    assert torch.isinf(row_errors(found, wanted)).tolist() == [True, True, True]


def test_another_shape_or_dtype_is_no_rounding():
    with pytest.raises(ValidationError, match="in place of"):
        row_errors(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValidationError, match="in place of"):
        row_errors(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


def test_large_tensors_are_compared_in_parts():
    wanted = torch.randn(5000, 512)
    found = wanted.clone()
    found[4321] += 1
    assert row_errors(found, wanted).nonzero().flatten().tolist() == [4321]


@pytest.mark.parametrize(
    ("dtypes", "allowed"),
    [([torch.float32], 1e-4), ([torch.float32, torch.bfloat16], 4 / 256), ([torch.float16, torch.int64], 4 / 2048)],
)
def test_what_passes_at_once_follows_the_least_precise_dtype(dtypes, allowed):
    assert allowed_error(dtypes, CPU) == pytest.approx(allowed)


def test_errors_as_large_as_noise_pass_and_the_noise_is_known():
    wanted = rows()
    (found,) = shaken(wanted, 0.05)(torch.Generator().manual_seed(9))
    result = compare([found], [wanted], 0.016, shaken(wanted, 0.05))
    assert result.error == pytest.approx(0.06, abs=0.02)
    assert 0.05 < result.noise < 0.1
    assert not result.unstable


def test_a_wrong_row_among_64_is_found_in_the_noise():
    wanted = rows()
    (found,) = shaken(wanted, 0.05)(torch.Generator().manual_seed(9))
    found[::64] = found[1::64]
    with pytest.raises(ValidationError, match="in 2 of 128 rows"):
        compare([found], [wanted], 0.016, shaken(wanted, 0.05))


def test_an_error_in_all_rows_three_times_the_noise_is_found():
    wanted = rows()
    with pytest.raises(ValidationError, match="of 128 rows"):
        compare([wanted * 1.15], [wanted], 0.016, shaken(wanted, 0.05))


def test_rows_that_noise_sends_elsewhere_may_be_anywhere_and_no_others():
    wanted = rows()
    found = wanted.clone()
    found[:5] = found[60:65]
    compare([found], [wanted], 0.016, shaken(wanted, 0.01, flipped=8))
    found[100] = found[60]
    with pytest.raises(ValidationError, match="in 1 of 128 rows"):
        compare([found], [wanted], 0.016, shaken(wanted, 0.01, flipped=8))


def test_trials_go_on_while_a_row_is_unexplained_that_noise_seldom_moves():
    wanted, trials = rows(), []
    found = wanted.clone()
    found[0] = found[1]

    def trial(generator: torch.Generator) -> list[Tensor]:
        trials.append(generator.initial_seed())
        return shaken(wanted, 0.01, flipped=int(len(trials) == 9))(generator)

    compare([found], [wanted], 0.016, trial)
    assert len(trials) == 9


def with_wrong_rows(wanted: Tensor, count: int) -> Tensor:
    """So many rows are others'."""
    value = wanted.clone()
    value[100 : 100 + count] = wanted[200 : 200 + count]
    return value


def test_where_each_trial_moves_a_row_that_no_other_does_a_few_more_may_differ():
    wanted = rows(count=256)

    def trial(generator: torch.Generator) -> list[Tensor]:
        (moved,) = shaken(wanted, 0.01)(generator)
        own = generator.initial_seed()
        moved[own] = wanted[own + 1]
        return [moved]

    compare([with_wrong_rows(wanted, 3)], [wanted], 0.016, trial)
    with pytest.raises(ValidationError, match="in 4 of 256 rows"):
        compare([with_wrong_rows(wanted, 4)], [wanted], 0.016, trial)
    with pytest.raises(ValidationError, match="in 1 of 256 rows"):
        compare([with_wrong_rows(wanted, 1)], [wanted], 0.016, shaken(wanted, 0.01))


def test_rows_that_stray_together_are_as_many_as_one_trial_moves_alone():
    """A token that goes elsewhere takes the rows of all its heads along, so a mean over trials says little."""
    wanted = rows(count=256)

    def trial(generator: torch.Generator) -> list[Tensor]:
        (moved,) = shaken(wanted, 0.01)(generator)
        if generator.initial_seed() == 3:
            moved[:6] = wanted[6:12]
        return [moved]

    compare([with_wrong_rows(wanted, 6)], [wanted], 0.016, trial)
    with pytest.raises(ValidationError, match="in 7 of 256 rows"):
        compare([with_wrong_rows(wanted, 7)], [wanted], 0.016, trial)


def test_without_trials_the_bound_is_the_last_word():
    wanted = rows()
    with pytest.raises(ValidationError, match="exceeds"):
        compare([wanted * 1.05], [wanted], 0.016)


def test_a_model_whose_noise_hides_faults_is_unstable():
    wanted = rows()
    (found,) = shaken(wanted, 0.5)(torch.Generator().manual_seed(9))
    assert compare([found], [wanted], 0.016, shaken(wanted, 0.5)).unstable


def test_without_tensors_nothing_is_compared():
    assert compare([1, None], [1, None], 0.1).error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_a_little_more_than_rounding(dtype):
    graph = fx.Graph()
    x = graph.placeholder("x")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, x))
    value = rows(dtype)
    noisy = with_noise(product, value, [rows(dtype) + 1], torch.Generator().manual_seed(0))
    error = ((noisy.double() - value.double()) / value.double()).abs()
    assert noisy.dtype == dtype
    assert unit(dtype, CPU) < float(error.max()) < 4 * unit(dtype, CPU)


def test_what_rounds_nothing_stays_exact():
    graph = fx.Graph()
    x = graph.placeholder("x")
    aten, value = torch.ops.aten, rows()
    generator = torch.Generator().manual_seed(0)
    for target, arguments in (
        (aten.cat.default, [value]),
        (aten.view.default, [value]),
        (aten.slice.Tensor, [value]),
        (aten._to_copy.default, [value]),
        (aten.arange.default, []),
    ):
        node = graph.call_function(target, (x,) if arguments else ())
        result = value if target is aten.slice.Tensor else value.clone()
        assert with_noise(node, result, arguments, generator) is result
    assert (
        with_noise(graph.call_function(aten.argmax.default, (x,)), torch.ones(3).long(), [value], generator).tolist()
        == [1] * 3
    )


def test_noise_is_one_sided_in_some_trials_and_in_others_it_is_not():
    """A count of the values above a threshold hardly moves where each value moves on its own."""
    graph, value = fx.Graph(), rows()
    product = graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"),))
    lowest = value[value > 1].min()
    counted = int((value > lowest).sum())

    def count(seed: int) -> int:
        noisy = with_noise(product, value, [rows() + 1], torch.Generator().manual_seed(seed))
        return int((noisy > lowest).sum()) - counted

    at_lowest, counts = int((value == lowest).sum()), [count(seed) for seed in range(48)]
    assert at_lowest > 10
    assert max(counts) > 0.7 * at_lowest
    assert sum(abs(each) < 0.5 * at_lowest for each in counts) > 20


def test_what_is_too_small_for_the_dtype_has_noise_and_true_zeros_have_none():
    graph = fx.Graph()
    x, aten = graph.placeholder("x"), torch.ops.aten
    softmax, product = (graph.call_function(op, (x,)) for op in (aten.softmax.int, aten.mul.Tensor))
    value = torch.tensor([0.0, 6e-8, 1.0]).repeat(1000, 1).half()

    def moved(node: fx.Node) -> list[bool]:
        noisy = with_noise(node, value, [rows(torch.float16)], torch.Generator().manual_seed(0))
        return [bool((one != other).any()) for one, other in zip(noisy.T, value.T, strict=True)]

    assert moved(softmax) == [True, True, True]
    assert moved(product) == [False, True, True]
