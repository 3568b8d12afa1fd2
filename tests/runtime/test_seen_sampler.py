"""What the first pictures of a generation say of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.runtime.seen_sampler import SeenSampler
from tests.harness import own_warnings
from tests.models import Sizes, make_inputs, make_model

STEPS = 5
SHAPES = {"digits": (2, 1, 8, 8), "latents": (1, 4, 32, 32), "tokens": (2, 64, 16)}
Draw = Callable[[Tensor, int, Callable[[Tensor], Tensor]], Tensor]


def smooth(weights: Tensor, time: float) -> Callable[[Tensor], Tensor]:
    """A model: a function of the picture that is no linear one."""
    return lambda x: torch.tanh(x * weights + time) - 0.1 * x


def euler(x: Tensor, step: int, model: Callable[[Tensor], Tensor]) -> Tensor:
    return x - model(x) / STEPS


def ddim(x: Tensor, step: int, model: Callable[[Tensor], Tensor]) -> Tensor:
    now, then = ((1 - (step + n) / (STEPS + 1)) for n in (0.5, 1.5))  # the noise's part
    noise = model(x)
    return (1 - then**2) ** 0.5 * (x - now * noise) / (1 - now**2) ** 0.5 + then * noise


def ancestral(x: Tensor, step: int, model: Callable[[Tensor], Tensor]) -> Tensor:
    return euler(x, step, model) + 0.05 * torch.randn_like(x)


def clipped(x: Tensor, step: int, model: Callable[[Tensor], Tensor]) -> Tensor:
    return euler(x, step, model).clamp(-1, 1)


def seen(
    draw: Draw, shape: Sequence[int], dtype: torch.dtype = torch.float32, guided: str = "", steps: int = STEPS
) -> bool | None:
    """What is seen of a sampler that keeps its picture in float32, whose model is given it in `dtype`."""
    torch.manual_seed(0)
    x, sampler, weights = torch.randn(*shape), SeenSampler(), torch.rand(2, *shape[1:]) + 0.5
    for step in range(steps):

        def model(x: Tensor, step: int = step) -> Tensor:
            given = x.to(dtype)
            outputs = [smooth(w.to(dtype), step / STEPS)(given) for w in weights]
            if guided == "one call":
                sampler.note(step, torch.cat([given, given]), (torch.cat(outputs),))
            elif guided == "side by side":
                pairs = torch.stack(outputs, 1).flatten(0, 1)
                sampler.note(step, given.repeat_interleave(2, 0), (pairs,))
            elif guided == "two calls":
                for output in outputs:
                    sampler.note(step, given, (output,))
            else:
                sampler.note(step, given, (None, outputs[0]))
                return outputs[0].float()
            return (outputs[0] + 2.5 * (outputs[1] - outputs[0])).float()

        x = draw(x, step, model)
    return sampler.deterministic()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("guided", ["", "one call", "side by side", "two calls"])
@pytest.mark.parametrize("draw", [euler, ddim])
def test_a_sampler_without_noise_is_seen(draw: Draw, guided: str, shape: str) -> None:
    assert seen(draw, SHAPES[shape], guided=guided) is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_and_where_the_model_runs_in_16_bits(dtype: torch.dtype) -> None:
    assert seen(euler, SHAPES["latents"], dtype, guided="one call") is True
    assert seen(ancestral, SHAPES["latents"], dtype, guided="one call") is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("guided", ["", "one call", "two calls"])
@pytest.mark.parametrize("draw", [ancestral, clipped])
def test_nothing_is_said_of_others(draw: Draw, guided: str, shape: str) -> None:
    assert seen(draw, SHAPES[shape], guided=guided) is None


def test_adams_bashforth_is_seen() -> None:
    past: list[Tensor] = []

    def adams(x: Tensor, step: int, model: Callable[[Tensor], Tensor]) -> Tensor:
        past.append(model(x))
        return x - (past[-1] if step == 0 else 1.5 * past[-1] - 0.5 * past[-2]) / STEPS

    assert seen(adams, SHAPES["digits"]) is True


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_heun_whose_second_call_is_at_the_time_of_the_next_first_one(noise: float) -> None:
    torch.manual_seed(0)
    x, sampler, weights = torch.randn(1, 4, 16, 16), SeenSampler(), torch.rand(4, 16, 16) + 0.5

    def model(x: Tensor, number: int) -> Tensor:
        output = torch.tanh(3 * x * weights + number)
        sampler.note(number, x, (output,))
        return output

    for step in range(4):
        first = model(x, step)
        x = x - (first + model(x - first / STEPS, step + 1)) / 2 / STEPS + noise * torch.randn_like(x)
    assert sampler.deterministic() is (None if noise else True)


def test_noise_that_begins_late_takes_it_back() -> None:
    sampler, x = SeenSampler(), torch.randn(1, 4, 16, 16)
    found = []
    for step in range(20):
        sampler.note(step, x, (smooth(torch.ones(4, 16, 16), step / 20)(x),))
        x = euler(x, step, smooth(torch.ones(4, 16, 16), step / 20)) + (step > 6) * 0.05 * torch.randn_like(x)
        found.append(sampler.deterministic())
    assert found == [None] * 2 + [True] * 15 + [None] * 3


def test_calls_at_one_time_are_kept_up_to_a_bound() -> None:
    sampler = SeenSampler()
    for _ in range(100):
        sampler.note(0, torch.randn(1, 64), (torch.randn(1, 64),))
    assert len(sampler._steps[0].calls) < 10
    assert sampler.deterministic() is None


@pytest.mark.parametrize(
    "odd",
    [
        torch.empty(2, 64, device="meta"),
        torch.eye(8).to_sparse(),
        torch.zeros(2, 64, dtype=torch.int64),
        torch.zeros(2, 64, dtype=torch.complex64),
        torch.zeros(0, 64),
        torch.zeros(()),
        torch.full((2, 64), float("inf")),
        torch.ones(2, 64, requires_grad=True),
        None,
    ],
    ids=["meta", "sparse", "integers", "complex", "no samples", "a number", "infinite", "leaf", "none"],
)
def test_what_cannot_be_read_says_nothing_and_raises_nothing(odd: Tensor | None) -> None:
    sampler = SeenSampler()
    for step in range(4):
        sampler.note(step, odd, (odd,))
        assert sampler.deterministic() is None


def test_what_is_not_seen_yet_or_not_comparable_says_nothing() -> None:
    assert seen(euler, SHAPES["digits"], steps=2) is None
    assert seen(euler, (2, 1, 2, 3)) is None, "more weights than elements to tell them by"
    assert seen(lambda x, step, model: x + 0 * model(x), SHAPES["digits"]) is None, "the picture stays"
    assert seen(lambda x, step, model: model(x) * float("nan"), SHAPES["digits"]) is None
    sampler, x = SeenSampler(), torch.randn(2, 64)
    for step in range(4):
        sampler.note(step, x, (x[:, :3],))
        sampler.note(step, None, (x,))
    assert sampler.deterministic() is None


def test_a_picture_beside_its_variance() -> None:
    sampler, x = SeenSampler(), torch.randn(1, 4, 8, 8)
    for step in range(3):
        output = smooth(torch.ones(4, 8, 8), step / STEPS)(x)
        sampler.note(step, x, (torch.cat([output, torch.randn_like(output)], 1),))
        x = x - output / STEPS
    assert sampler.deterministic() is True


# --- in a generation -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("noise", "options", "corrected"),
    [
        (0.0, {}, True),
        (0.1, {}, False),
        (0.0, {"sampler": "stochastic"}, False),
        (0.1, {"sampler": "deterministic"}, True),
        (0.0, {"recipe": "stack-forecast"}, False),
    ],
)
def test_auto_corrects_where_it_sees_no_noise(noise: float, options: dict[str, str], corrected: bool) -> None:
    model = make_model(Sizes(depth=2, experts=3, width=16, heads=2, expert_width=16))
    x, labels = make_inputs(model)
    fast = torch.compile(model, backend="moeca", options={"lowering": "eager", "validate": False, **options})
    steps = 12
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn_like(x)
            for step in range(steps):
                output = fast(x, torch.full((len(x),), 1 - step / steps), labels)
                x = x - output / steps + noise * torch.randn_like(x)
    report = moeca_compile.report(fast)
    assert (report.corrections > 0) is corrected
    assert report.steps["cache"] > 0 and own_warnings(report) == []
