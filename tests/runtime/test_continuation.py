"""Steps of samplers that add fresh noise, told from other pictures by what the pictures hold."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moeca_compile.runtime import continuation
from moeca_compile.runtime.continuation import Answer, Trajectory
from moeca_compile.runtime.scope import generation
from moeca_compile.runtime.streams import Streams
from tests.runtime.calls import COND, EVERYTHING, call, make_streams, picture

pytestmark = pytest.mark.smoke


def clean(seed: int, samples: int = 2) -> Tensor:
    """Pictures of 3 x 32 x 32 elements that have a background in common, half of their size."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(samples, 3, 4, 4, generator=generator).repeat_interleave(8, -1).repeat_interleave(8, -2)
    return (own - 1) / 2**0.5


def ddpm(shown: Tensor, steps: int, seed: int = 0) -> list[Tensor]:
    """The inputs of a perfect model at the steps of DDPM: each is drawn from the posterior, given the one before."""
    generator, apart = torch.Generator().manual_seed(seed), 1000 // steps
    levels = (1 - torch.linspace(1e-4, 0.02, 1000)).log().cumsum(0).exp()[apart - 1 :: apart].flip(0).tolist()
    x = torch.randn(shown.shape, generator=generator)
    inputs = [x]
    for now, then in pairwise(levels):
        kept, fresh = now / then, torch.randn(x.shape, generator=generator)
        mean = (then**0.5 * (1 - kept) * shown + kept**0.5 * (1 - then) * x) / (1 - now)
        x = mean + ((1 - then) / (1 - now) * (1 - kept)) ** 0.5 * fresh
        inputs.append(x)
    return inputs


def refreshed(model: Streams, inputs: list[Tensor], steps: int) -> list[bool]:
    """Which calls with these inputs are full."""
    return [call(model, 1 - n / steps, x=x, y=COND).refresh == EVERYTHING for n, x in enumerate(inputs)]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_steps_that_add_much_fresh_noise_go_on(steps, marked):
    """The first of ten has a correlation of 0.39."""
    for seed in range(5):
        with generation() if marked else nullcontext():
            found = refreshed(make_streams(full_every=100), ddpm(clean(seed), steps, seed), steps)
        assert found == [True] + [False] * (steps - 1)


def test_nor_does_a_warning_come_where_the_host_cannot_wait(monkeypatch):
    monkeypatch.setattr(continuation, "answers_at_once", lambda device: False)
    model = make_streams(full_every=100)
    assert refreshed(model, ddpm(clean(0), 10), 10) == [True, True] + [False] * 8  # the second shows time's direction
    assert not model.requests.strayed


@pytest.mark.parametrize("slots", [slice(None), slice(1)])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_another_picture_is_noticed_between_such_steps(steps, marked, slots):
    """In all slots of the batch, or in one, with the same background, until pictures are mostly that."""
    for at in range(1, round(0.9 * steps)):
        inputs = ddpm(clean(0), steps)[: at + 1]
        inputs[at] = inputs[at].clone()
        inputs[at][slots] = ddpm(clean(1), steps, seed=1)[at][slots]
        with generation() if marked else nullcontext():
            assert refreshed(make_streams(full_every=100), inputs, steps)[at]


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.movedim(1, -1), lambda x: x.flatten(2)])
def test_other_noise_on_the_same_picture_is_noticed(layout):
    """Wherever the channels are, which have nothing in common with one another."""
    shown = clean(0) + 0.5**0.5
    inputs, others = ddpm(shown, 10), ddpm(shown, 10, seed=1)
    for before, now in zip(inputs[:8], others[1:9], strict=True):
        assert continuation_of(layout(before), layout(now)) is Answer.OTHER


def test_the_noise_of_five_steps_is_too_much_to_tell_them_from_another_picture():
    """So the first ones are full."""
    with generation():
        found = refreshed(make_streams(full_every=100), ddpm(clean(0), 5), 5)
    assert found[:2] == [True, True] and found[3:] == [False, False]


@pytest.mark.parametrize("steps", [10, 50])
def test_of_requests_with_like_pictures_each_goes_on_with_its_own(steps):
    """At the end each could go on with the other's: they take turns unmarked in one thread, with equal arguments."""
    model, pictures = make_streams(full_every=100), [0.2 * clean(seed) - 1 for seed in (0, 1)]
    inputs, streams = [ddpm(shown, steps, seed) for seed, shown in enumerate(pictures)], {}
    for n in range(steps):
        for seed in (0, 1):
            made = call(model, 1 - n / steps, x=inputs[seed][n], y=COND)
            if made.refresh == EVERYTHING:
                streams[id(made.stream)] = seed
            assert streams[id(made.stream)] == seed
    assert continuation_of(inputs[0][-2], inputs[1][-1]) is Answer.GOES_ON


def continuation_of(before: Tensor, now: Tensor) -> Answer:
    trajectory = Trajectory()
    trajectory.note(before, ())
    return trajectory.look(now)[0]


def test_a_slot_of_zeros_stands_still():
    before = torch.cat([picture(samples=1), torch.zeros(1, 3, 8, 8)])
    assert continuation_of(before, 0.9 * before) is Answer.GOES_ON
    after = torch.cat([picture(samples=1), picture(samples=1)])
    assert continuation_of(before, after) is Answer.OTHER
