"""Sampling digits over HTTP.

python -m examples.serve.service --port 8000

POST /samples          {"label": 3}, and if you like seed, steps, guidance, previews (one every so many steps). The
                       answer is a line of JSON with the request's id, one for each preview, and one with the picture
                       (8 rows of 8 numbers, -1 is black and 1 is white) or an error. 503 where too many wait.
DELETE /samples/{id}   ends a request. So does a client that closes its connection.
GET /report            requests, seconds, bytes of caches, steps by kind, warnings.
"""

import argparse
import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from socket import socket
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from examples.digits.testbed import load_model
from examples.serve.worker import Full, Request, Worker
from examples.testbed.arguments import usable_device, whole_number

OPTIONS = {"recipe": "stack-forecast", "schedule": "power", "corrector": True}
"""Its full steps come by step numbers alone: no request decides about those that share its batch."""


class Wish(BaseModel):
    """What a client may ask for."""

    model_config = ConfigDict(extra="forbid", strict=True)
    label: int = Field(ge=0, le=9)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(50, ge=1, le=200)
    guidance: float = Field(1.5, ge=0, le=20, allow_inf_nan=False)
    previews: int = Field(0, ge=0)


class Lines(StreamingResponse):
    """The lines of a request, which is cancelled if they are not read to the end: the client has gone."""

    def __init__(self, worker: Worker, request: Request, lines: asyncio.Queue[dict[str, Any]]) -> None:
        super().__init__(self._lines(request, lines), media_type="application/x-ndjson")
        self._cancel = lambda: worker.cancel(request.id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()

    @staticmethod
    async def _lines(request: Request, lines: asyncio.Queue[dict[str, Any]]) -> AsyncIterator[str]:
        line: dict[str, Any] = {"id": request.id}
        while True:
            yield json.dumps(line) + "\n"
            if "picture" in line or "error" in line:
                return
            line = await lines.get()


def make_app(worker: Worker) -> FastAPI:
    """The service around a worker, which it starts and stops: no port is open before all is compiled."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(worker.start)
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="Digits", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "; ".join(map(explained, error.errors()))}, 422)

    @app.post("/samples")
    async def sample(wish: Wish) -> StreamingResponse:
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()
        request = Request(**wish.model_dump(), send=lambda line: loop.call_soon_threadsafe(lines.put_nowait, line))
        worker.submit(request)
        return Lines(worker, request, lines)

    @app.exception_handler(Full)
    async def full(*_: Any) -> JSONResponse:
        seconds = math.ceil(worker.usual_seconds())
        return JSONResponse(
            {"error": f"{worker.queue} requests wait already; try again in {seconds} s"},
            503,
            headers={"Retry-After": str(seconds)},
        )

    @app.delete("/samples/{id}")
    async def cancel(id: str) -> JSONResponse:
        if worker.cancel(id):
            return JSONResponse({"id": id, "cancelled": True})
        return JSONResponse({"error": f"no request {id} waits or runs: it has ended, or there was none"}, 404)

    @app.get("/report")
    def report() -> dict[str, Any]:
        return worker.report()

    return app


class Server(uvicorn.Server):
    """Serves a worker. When it stops, open requests get a last line, so that nothing waits for them to end."""

    def __init__(self, worker: Worker, **settings: Any) -> None:
        super().__init__(uvicorn.Config(make_app(worker), timeout_graceful_shutdown=5, **settings))
        self._worker = worker

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        await asyncio.to_thread(self._worker.stop)
        await super().shutdown(sockets)


def explained(error: dict[str, Any]) -> str:
    """A mistake in a request: the field, what is allowed, and what was given."""
    where = ".".join(map(str, error["loc"][1:])) or "body"
    given = "" if error["type"] in ("missing", "json_invalid") else f", not {error['input']!r}"
    return f"{where}: {error['msg']}{given}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=whole_number(1, 65535), default=8000, help="(8000)")
    parser.add_argument("--rows", type=whole_number(1), default=4, help="pictures in a batch (4)")
    parser.add_argument("--batches", type=whole_number(1), default=2, help="batches that take turns (2)")
    parser.add_argument("--queue", type=whole_number(1), default=32, help="requests that may wait (32)")
    parser.add_argument("--backend", choices=("moeca", "inductor"), default="moeca", help="inductor caches nothing")
    parser.add_argument("--device", type=usable_device, default="cpu", help="(cpu)")
    args = parser.parse_args(argv)
    options = OPTIONS if args.backend == "moeca" else None
    model = torch.compile(load_model().to(args.device), backend=args.backend, options=options)
    server = Server(Worker(model, args.rows, args.batches, args.queue), port=args.port, log_level="warning")
    with suppress(KeyboardInterrupt):
        server.run()


if __name__ == "__main__":
    main()
