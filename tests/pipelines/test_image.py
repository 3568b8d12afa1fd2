"""The time and the number of steps, from schedulers that tell more or less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeca_compile.pipelines.image import Clock, Image
from moeca_compile.runtime import scope

TIMES = torch.tensor([9.0, 7.0, 7.0, 5.0, 5.0, 2.0])


def scheduler(step_index: int | None = None, begin_index: int | None = None, timesteps: Any = TIMES) -> Any:
    known = {"set_timesteps": None, "step": None, "timesteps": timesteps}
    return SimpleNamespace(step_index=step_index, begin_index=begin_index, **known)


def test_the_time_is_that_of_the_schedulers_step_from_where_it_begins_and_the_last_after_its_end():
    counting = scheduler(begin_index=1)
    clock = Clock(counting, None)
    times = [clock.time()]
    for index in range(2, 8):
        counting.step_index = index
        times.append(clock.time())
    assert times == [7.0, 7.0, 5.0, 5.0, 2.0, 2.0, 2.0]


def test_a_scheduler_that_did_not_say_where_it_begins_tells_no_time_later_either():
    counting = scheduler()
    clock = Clock(counting, None)
    assert clock.time() is None
    counting.step_index = 1
    assert clock.time() is None


@pytest.mark.parametrize(
    ("given", "most", "steps"),
    [
        (scheduler(begin_index=0), None, 4),
        (scheduler(begin_index=0), 3, 2),
        (scheduler(begin_index=3), 3, 2),
        (scheduler(), 3, 2),
        (scheduler(), 6, 4),
        (scheduler(), 100, 4),
        (scheduler(timesteps=None), None, None),
        (scheduler(timesteps=TIMES[:0], begin_index=0), None, None),
        (scheduler(timesteps=TIMES.view(2, 3), begin_index=0), None, None),
        (SimpleNamespace(timesteps=TIMES), None, 4),
        (None, 5, None),
    ],
)
def test_calls_in_a_row_at_one_timestep_are_one_step(given, most, steps):
    clock = Clock(given, most)
    assert clock.steps == steps
    if steps is None:
        assert clock.time() is None


def test_a_generation_asks_the_one_scheduler_when_the_model_is_called_and_a_marked_step_goes_before():
    counting = scheduler()
    pipe = SimpleNamespace(components={"scheduler": counting, "vae": object()})
    with Image(pipe) as image:
        counting.begin_index = 3  # told within the pipeline's call
        assert image.steps is None
        assert scope.current_time() == 5.0
        assert image.steps == 2
        with scope.step(0.5):
            assert scope.current_time() == 0.5
    assert scope.current_time() is None


def test_of_two_schedulers_nobody_knows_which():
    with Image(
        SimpleNamespace(components={"one": scheduler(begin_index=0), "two": scheduler(begin_index=0)})
    ) as image:
        assert scope.current_time() is None and image.steps is None


@pytest.mark.parametrize("draws", ["given", "listed", "torch's"])
def test_noise_between_calls_makes_a_sampler_stochastic_from_then_on(draws):
    given = torch.Generator().manual_seed(0)
    with Image(SimpleNamespace(components={}), [[given] if draws == "listed" else given, None, 3]) as image:

        def call() -> bool | None:
            scope.current_time()  # as a call of the denoiser asks for it
            return image.deterministic

        torch.rand(1, generator=given)  # the first picture
        assert call() is None
        assert call() is True and call() is True
        torch.rand(1, generator=None if draws == "torch's" else given)
        assert call() is False
        assert call() is False
