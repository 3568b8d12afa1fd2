"""Long runs: nothing grows, and threads at random requests get what each request alone gets."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.runtime.scope import generation
from tests.harness import own_warnings
from tests.models import TinyDiTMoE, make_inputs, make_model
from tests.runtime.calls import call, make_streams, picture

pytestmark = pytest.mark.slow
MINUTES, THREADS = 10, 8
REQUESTS = [(seed, steps) for seed in range(4) for steps in (4, 6, 9)]


def test_a_hundred_thousand_steps_leave_nothing_behind():
    """Of requests, marked or not, in turns of two."""
    model, labels = make_streams(), torch.tensor([1, 2])
    pictures = [picture(seed, moved=n / 1000) for seed in range(2) for n in range(50)]

    def steps(count: int) -> tuple[int, int]:
        for start in range(0, count, 100):
            handle = generation(object()) if start % 200 else None
            for n in range(50):
                for seed in range(2):
                    x = pictures[50 * seed + n]
                    if handle is not None and seed:
                        with handle:
                            call(model, 1 - n / 50, x=x, y=labels)
                    else:
                        call(model, 1 - n / 50, x=x, y=labels)
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects()), sys.getallocatedblocks()

    steps(10_000)
    (tensors, blocks), (later_tensors, later_blocks) = steps(2_000), steps(100_000)
    assert later_tensors == tensors
    assert later_blocks - blocks < 1_000


def sample(model: torch.nn.Module, network: TinyDiTMoE, seed: int, steps: int, marked: bool) -> Tensor:
    x, y = make_inputs(network, seed=seed)
    handle = moeca_compile.generation(model, steps=steps)
    for n in range(steps):
        t = torch.full((len(x),), 1 - n / steps)
        if marked:
            with handle:
                x = x - model(x, t, y) / steps
        else:
            x = x - model(x, t, y) / steps
    return x


def test_threads_at_random_requests():
    network = make_model()
    options = {"recipe": "moeca-forecast", "lowering": "eager", "max_generations": 2 * THREADS}
    model = torch.compile(network, backend="moeca", options=options)
    with torch.no_grad():
        alone = {request: sample(model, network, *request, marked=True) for request in REQUESTS}
    wrong: list[object] = []
    done, end = [0] * THREADS, time.monotonic() + 60 * MINUTES

    def work(number: int) -> None:
        draw = random.Random(number)
        with torch.no_grad():
            while time.monotonic() < end and not wrong:
                request = draw.choice(REQUESTS)
                try:
                    found = sample(model, network, *request, marked=draw.random() < 0.5)
                except BaseException as error:
                    wrong.append(error)
                    return
                if not torch.equal(found, alone[request]):
                    wrong.append((request, float((found - alone[request]).abs().max())))
                done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = moeca_compile.report(model)
    assert wrong == [] and own_warnings(report) == []
    assert min(done) > 0
    print(f"{sum(done)} requests, {report.steps}, {report.cache_bytes} bytes of caches")
