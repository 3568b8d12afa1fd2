"""The load test: what clients see of the service, with caches and under plain torch.compile.

python -m examples.serve.load

Both services run in processes of their own, and get the load in turns: requests one at a time, the same requests from
several clients at once, and then a crowd, more than can wait, that deletes its requests or goes away at the first
preview. The status is 1 if a picture depends on its company by more than rounding, or if caches are left.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from torch import Tensor

from examples.machine import environment
from examples.testbed.arguments import whole_number
from examples.testbed.metrics import psnr

Wish = dict[str, Any]
PLAIN, CACHED = "plain torch.compile", "moeca"
AT_ONCE = 64
"""How many of the crowd ask at once: more than fit in the queue and the batches."""
HALF_A_LEVEL = 1 / 255
"""Half a level of gray, in pictures of -1 to 1. Rounding depends on the company, by up to 1e-6: the rows of a batch
share products of matrices. Where that makes a router choose another expert, of equal score, it may be 1e-3."""
HEADERS = [
    *("service", "alone, s", "at once, s", "95th, s", "pictures/s", "difference", "PSNR, dB"),
    *("503s", "bytes left", "grown, MiB"),
]


@dataclass(frozen=True)
class Row:
    """What was measured of a service. Seconds of a request are from its sending to its picture."""

    service: str
    pictures: Tensor
    """[N, 1, 8, 8], of requests that came one at a time."""
    alone: float
    """Median seconds of these."""
    at_once: float
    """Median seconds where all clients ask at once; then the 95th percentile."""
    most: float
    per_second: float
    difference: float
    """The largest between a picture and the same one alone."""
    refused: int
    bytes_left: int
    """Of caches, after all requests have ended."""
    grown: float
    """MiB that the process holds more after the crowd than before."""

    @property
    def passed(self) -> bool:
        return self.difference <= HALF_A_LEVEL and self.bytes_left == 0

    def cells(self, plain: "Row") -> list[str]:
        times = [f"{each:.2f}" for each in (self.alone, self.at_once, self.most, self.per_second)]
        quality = "-" if self.service == plain.service else f"{psnr(self.pictures, plain.pictures):.1f}"
        left = [str(self.refused), str(self.bytes_left), f"{self.grown:.1f}"]
        return [self.service, *times, f"{self.difference:.0e}", quality, *left]


def wishes(count: int, steps: tuple[int, ...]) -> list[Wish]:
    return [{"label": n % 10, "seed": n, "steps": steps[n % len(steps)], "guidance": 1.5} for n in range(count)]


def sample(client: httpx.Client, wish: Wish) -> tuple[Tensor, float]:
    """The picture [1, 8, 8], and the seconds that it took."""
    start = time.perf_counter()
    with client.stream("POST", "/samples", json=wish) as response:
        response.raise_for_status()
        *_, last = map(json.loads, response.iter_lines())
    return torch.tensor([last["picture"]]), time.perf_counter() - start


def abandon(client: httpx.Client, wish: Wish, delete: bool) -> int:
    """Ask for a picture, and delete the request or go away at its first preview. The status of the answer."""
    with client.stream("POST", "/samples", json={**wish, "previews": 1}) as response:
        if response.status_code == 200:
            lines = map(json.loads, response.iter_lines())
            id, _ = next(lines)["id"], next(lines)
            if delete:
                client.delete(f"/samples/{id}")
    return response.status_code


def bytes_left(client: httpx.Client, patience: float = 30) -> int:
    """Bytes of caches once no request is left. A batch that nobody waits for ends at its next step."""
    end = time.monotonic() + patience
    while True:
        found = client.get("/report").json()
        if found["waiting"] == found["running"] == found["cache_bytes"] == 0 or time.monotonic() > end:
            return int(found["cache_bytes"])
        time.sleep(0.05)


def resident(process: int) -> float:
    """MiB of memory that a process holds."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def measure(name: str, url: str, process: int, asked: list[Wish], clients: int, crowd: int) -> Row:
    """Put a load on the service at `url` in `process`."""
    with httpx.Client(base_url=url, timeout=600) as client:
        pictures, alone = zip(*[sample(client, wish) for wish in asked], strict=True)
        with ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            found, seconds = zip(*pool.map(lambda wish: sample(client, wish), asked), strict=True)
            took = time.perf_counter() - start
        before = resident(process)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            impatient = [(client, asked[n % len(asked)], bool(n % 2)) for n in range(crowd)]
            statuses = list(pool.map(abandon, *zip(*impatient, strict=True)))
        left = bytes_left(client)
    return Row(
        service=name,
        pictures=torch.stack(pictures),
        alone=median(alone),
        at_once=median(seconds),
        most=sorted(seconds)[int(0.95 * len(seconds))],
        per_second=len(asked) / took,
        difference=float((torch.stack(found) - torch.stack(pictures)).abs().max()),
        refused=statuses.count(503),
        bytes_left=left,
        grown=resident(process) - before,
    )


@contextmanager
def service(backend: str) -> Iterator[tuple[str, int]]:
    """Address and process of a service that is compiled and takes requests."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.serve.service", "--port", str(port), "--backend", backend]
    process, url = subprocess.Popen(command), f"http://127.0.0.1:{port}"
    try:
        while not is_ready(url):
            if process.poll() is not None:
                raise RuntimeError(f"the service ended with status {process.returncode}: {' '.join(command)}")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/report").status_code == 200
    except httpx.ConnectError:
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=whole_number(1), default=40, help="of 20 and of 50 steps in turn (40)")
    parser.add_argument("--clients", type=whole_number(1), default=8, help="that ask at once (8)")
    parser.add_argument("--crowd", type=whole_number(1), default=256, help="requests that are abandoned (256)")
    parser.add_argument("--rounds", type=whole_number(1), default=2, help="of all that, for each service (2)")
    args = parser.parse_args(argv)
    asked, where = wishes(args.requests, (20, 50)), environment(torch.device("cpu"), torch.float32)
    where |= {name: version(name) for name in ("fastapi", "uvicorn")}
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    with service("inductor") as plain, service("moeca") as cached:
        turns = [(PLAIN, *plain), (CACHED, *cached)] * args.rounds
        rows = [measure(*each, asked, args.clients, args.crowd) for each in turns]
    for cells in (HEADERS, ["---"] * len(HEADERS), *(row.cells(rows[0]) for row in rows)):
        print(f"| {' | '.join(cells)} |")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
