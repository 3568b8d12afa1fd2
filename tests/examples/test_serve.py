"""The service over HTTP, with several clients at once, against pictures that `generate` draws one at a time."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from examples.digits.testbed import DIGITS, load_model
from examples.machine import private_copy
from examples.serve import load, worker
from examples.serve.service import OPTIONS, Lines, Server, make_app
from examples.serve.worker import Batch, Request, Worker
from examples.testbed.sampling import guided_velocity

WISHES = [{"label": n % 10, "seed": n, "steps": (6, 9)[n % 2], "guidance": 1.1 + n / 10} for n in range(10)]
LONG = {"label": 1, "steps": 200}
ROUNDING = 1e-5
"""A batch rounds by some 5e-7. No router decides by that: scores of these requests are at least 1e-5 apart."""


def compiled() -> nn.Module:
    options = {**OPTIONS, "lowering": "eager", "disk_cache": False}
    network = private_copy(load_model())
    network.blocks = network.blocks[:2]  # a third of the time
    return torch.compile(network, backend="moeca", options=options)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return compiled()


@pytest.fixture(scope="module")
def alone() -> list[Tensor]:
    """The pictures of WISHES, each [8, 8], sampled by themselves with another compiled model."""
    model, pictures = compiled(), []
    for wish in WISHES:
        labels, how = torch.tensor([wish["label"]]), {name: wish[name] for name in ("seed", "steps", "guidance")}
        with moeca_compile.generation(steps=wish["steps"]):
            pictures.append(DIGITS.generate(model, labels, **how)[0, 0])
    return pictures


@contextmanager
def running(worker: Worker) -> Iterator[tuple[httpx.Client, Server]]:
    """A client of a service, which runs in a thread as it does in a process."""
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = Server(worker, log_level="error")
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    with httpx.Client(base_url=url, timeout=60) as client:
        try:
            until(lambda: server.started)
            yield client, server
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(model: nn.Module) -> Iterator[httpx.Client]:
    with running(Worker(model)) as (client, _):
        yield client


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def gate(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """The worker takes a step for each release, and goes on freely after the test."""
    steps, opened = threading.Semaphore(0), threading.Event()

    def wait(*args: Any) -> Tensor:
        while not opened.is_set() and not steps.acquire(timeout=0.01):
            pass
        return guided_velocity(*args)

    monkeypatch.setattr(worker, "guided_velocity", wait)
    yield steps
    opened.set()
    until(partial(is_idle, client))


def lines(client: httpx.Client, **wish: Any) -> list[dict[str, Any]]:
    """All lines of the answer."""
    with client.stream("POST", "/samples", json=wish) as response:
        assert response.status_code == 200
        return [json.loads(line) for line in response.iter_lines()]


@contextmanager
def asked(client: httpx.Client, **wish: Any) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """The id of a request, and its lines as they come."""
    with client.stream("POST", "/samples", json=wish) as response:
        assert response.status_code == 200
        found = map(json.loads, response.iter_lines())
        yield next(found)["id"], found


def sample_all(client: httpx.Client) -> list[Tensor]:
    """The pictures of WISHES, of as many clients at once."""
    with ThreadPoolExecutor(len(WISHES)) as pool:
        return list(pool.map(lambda wish: torch.tensor(lines(client, **wish)[-1]["picture"]), WISHES))


def state(client: httpx.Client) -> dict[str, Any]:
    return client.get("/report").json()


def is_idle(client: httpx.Client) -> bool:
    found = state(client)
    return found["waiting"] == found["running"] == found["cache_bytes"] == 0


def differences(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]


# No request sees another


def test_clients_at_once_get_the_pictures_that_they_get_alone(client, alone):
    for _ in range(2):
        assert max(differences(sample_all(client), alone)) < ROUNDING
    until(partial(is_idle, client))
    found = state(client)
    assert found["steps"]["cache"] > found["steps"]["full"] and found["warnings"] == []


def test_batches_that_share_a_handle_are_seen(client, alone, monkeypatch):
    """A fault that is planted: the test above would find it."""
    shared = moeca_compile.generation(object())
    monkeypatch.setattr(worker.moeca_compile, "generation", lambda *_, **__: shared)
    monkeypatch.setattr(shared, "close", lambda: None)
    assert max(differences(sample_all(client), alone)) > 100 * ROUNDING
    monkeypatch.undo()
    shared.close()


def test_a_short_request_ends_beside_a_long_one(client, gate):
    with asked(client, **LONG):
        with asked(client, label=2, steps=4) as (_, later):
            gate.release(1 + 2 * 4)
            assert "picture" in next(later)
        assert state(client)["running"] == 1


# Previews


def test_previews_come_while_the_request_runs(client, gate):
    with asked(client, label=3, steps=6, previews=2) as (_, later):
        gate.release(2)
        first = next(later)
        assert first["step"] == 2 and state(client)["running"] == 1
        gate.release(4)
        second, last = later  # after the last step there is the picture
    assert second["step"] == 4 and last["step"] == 6 and "preview" not in last
    assert torch.tensor(first["preview"]).shape == torch.tensor(last["picture"]).shape == (8, 8)
    assert len({str(line.get("preview", line.get("picture"))) for line in (first, second, last)}) == 3


def test_no_previews_where_none_are_asked_for(client):
    assert [list(line) for line in lines(client, label=3, steps=4)] == [["id"], ["step", "picture"]]


# Cancelled and abandoned requests


def begun(client: httpx.Client, gate: threading.Semaphore, later: Iterator[dict[str, Any]]) -> None:
    """Take steps until the first preview: caches are filled."""
    gate.release(1)
    assert "preview" in next(later)
    assert state(client)["cache_bytes"] > 0


def test_a_deleted_request_frees_its_caches(client, gate):
    before = state(client)["cancelled"]
    with asked(client, **LONG, previews=1) as (id, later):
        begun(client, gate, later)
        assert client.delete(f"/samples/{id}").json() == {"id": id, "cancelled": True}
        assert next(later) == {"error": "cancelled"} and list(later) == []
        gate.release(1)
        until(partial(is_idle, client))
    assert state(client)["cancelled"] == before + 1
    assert client.delete(f"/samples/{id}").status_code == 404


def test_a_client_that_goes_away_frees_its_caches(client, gate):
    with asked(client, **LONG, previews=1) as (_, later):
        begun(client, gate, later)
    until(lambda: state(client)["running"] == 0)
    gate.release(1)
    until(partial(is_idle, client))


def test_others_in_its_batch_get_their_pictures(client, alone, gate):
    with ExitStack() as stack:
        wanted = [stack.enter_context(asked(client, **LONG))]  # its step does not end: the next ones wait together
        until(lambda: state(client)["running"] == 1)
        wanted += [stack.enter_context(asked(client, **{**WISHES[n], "previews": 2})) for n in (0, 2, 4)]
        gate.release(1 + 2 * 2)
        ids, found = zip(*wanted, strict=True)
        assert [next(each)["step"] for each in found[1:]] == [2, 2, 2]
        client.delete(f"/samples/{ids[2]}")
        gate.release(2 * 4)
        last = [list(found[n])[-1] for n in (1, 3)]
    assert max(differences([torch.tensor(line["picture"]) for line in last], [alone[0], alone[4]])) < ROUNDING


def left() -> list[object]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Request, Batch, Lines)]


def test_many_abandoned_requests_leave_nothing_behind(client):
    def leave(n: int) -> None:
        with asked(client, **LONG, seed=n, previews=1) as (id, later):
            if n % 3:  # others leave while they wait
                next(later)
            if n % 2:
                client.delete(f"/samples/{id}")

    before = state(client)["cancelled"]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(leave, range(40)))
    until(partial(is_idle, client))
    assert state(client)["cancelled"] == before + 40
    until(lambda: not left())


# Limits and errors


def test_a_full_queue_says_when_to_try_again(client, gate):
    with ExitStack() as stack:
        for _ in range(1 + 32):
            stack.enter_context(asked(client, **LONG))
            until(lambda: state(client)["running"] == 1)
        answer = client.post("/samples", json=LONG)
        assert state(client)["waiting"] == 32
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"].startswith("32 requests wait already; try again in ")
    until(lambda: state(client)["waiting"] == 0)
    with asked(client, label=1):
        pass


WRONG = {
    "no label": ({}, "label: Field required"),
    "a label that is none": ({"label": 10}, "label: Input should be less than or equal to 9, not 10"),
    "a label in words": ({"label": "three"}, "label: Input should be a valid integer, not 'three'"),
    "no steps": ({"label": 1, "steps": 0}, "steps: Input should be greater than or equal to 1, not 0"),
    "too many steps": ({"label": 1, "steps": 201}, "steps: Input should be less than or equal to 200, not 201"),
    "half a step": ({"label": 1, "steps": 1.5}, "steps: Input should be a valid integer, not 1.5"),
    "a seed below 0": ({"label": 1, "seed": -1}, "seed: Input should be greater than or equal to 0, not -1"),
    "too large a seed": ({"label": 1, "seed": 2**64}, f"seed: Input should be less than {2**63}, not {2**64}"),
    "guidance that is no number": (
        '{"label": 1, "guidance": NaN}',
        "guidance: Input should be a finite number, not nan",
    ),
    "a name that is not known": ({"label": 1, "size": 8}, "size: Extra inputs are not permitted, not 8"),
    "two mistakes": ({"label": -1, "previews": -1}, "; previews: Input should be greater than or equal to 0, not -1"),
    "no JSON": ("label=1", "JSON decode error"),
    "no object": ("[1]", "Input should be a valid dictionary or object"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_in_a_request_is_explained(client, wrong):
    wish, explained = WRONG[wrong]
    text = wish if isinstance(wish, str) else json.dumps(wish)
    answer = client.post("/samples", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert explained in answer.json()["error"]


def test_a_batch_that_fails_says_so_and_the_next_one_runs(client, alone, monkeypatch):
    def fails(*_: Any) -> Tensor:
        raise MemoryError("no room")

    before = state(client)["failed"]
    with monkeypatch.context() as patch:
        patch.setattr(worker, "guided_velocity", fails)
        assert lines(client, label=1)[-1] == {"error": "sampling failed: MemoryError('no room')"}
    assert state(client)["failed"] == before + 1
    assert "picture" in lines(client, label=1, steps=4)[-1]
    assert is_idle(client)


def samplers() -> int:
    return [thread.name for thread in threading.enumerate()].count("sampling")


def test_the_service_stops_and_tells_all_who_wait(model):
    before = samplers()
    with running(Worker(model)) as (client, server), ExitStack() as stack:
        found = [stack.enter_context(asked(client, **LONG, seed=n, previews=1))[1] for n in range(20)]
        next(found[0])
        assert samplers() == before + 1 and moeca_compile.report(model).cache_bytes > 0
        server.should_exit = True
        assert [list(each)[-1]["error"] for each in found] == ["the service is stopping: ask again later"] * 20
    assert samplers() == before and moeca_compile.report(model).cache_bytes == 0


def test_a_worker_that_has_stopped_takes_no_more(model):
    stopping = Worker(model)
    with running(stopping) as (client, _):
        stopping.stop()
        assert client.post("/samples", json=LONG).status_code == 503


def test_the_app_in_another_server_starts_and_stops_its_worker(model):
    app, before = make_app(Worker(model)), samplers()

    async def serve() -> None:
        async with app.router.lifespan_context(app):
            assert samplers() == before + 1

    asyncio.run(serve())
    assert samplers() == before


# The load test


def test_the_load_test_measures_and_judges(client):
    url, wishes = str(client.base_url), load.wishes(6, (4, 6))
    row = load.measure(load.CACHED, url, os.getpid(), wishes, clients=3, crowd=80)
    assert row.passed and row.refused > 0 and row.per_second > 0 < row.at_once <= row.most
    black = torch.zeros_like(row.pictures)
    cells = replace(row, pictures=black).cells(replace(row, service=load.PLAIN, pictures=black + 0.1))
    assert cells[load.HEADERS.index("PSNR, dB")] == "26.0"  # 20 log10(2 / 0.1)
    assert len(cells) == len(load.HEADERS)
    assert not replace(row, difference=1.0).passed and not replace(row, bytes_left=1).passed
