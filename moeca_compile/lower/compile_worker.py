"""The process that compiles parts of steps beside the one that runs them (lower.background started it).

It is given jobs on its standard input: pickled dicts, from the process that started it alone. It answers on its
standard output, a line of JSON each:

    {"part": 1}       before each part of a job
    {"compiled": 5}   at the end of a job: how many of its parts were not on disk before
    {"failed": why}   in its place

What it compiles goes to Inductor's cache on disk, where the other process finds it. It has no weights: compiling
needs shapes alone. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import apply_settings, graphs_from_disk, make_cpp_compiler_ready
from moeca_compile.disk.form import examples_of, graph_of
from moeca_compile.disk.keys import digest, environment
from moeca_compile.lower.parts import Parts
from moeca_compile.lower.program import compile_parts
from moeca_compile.text import first_line


class _Given(NamedTuple):
    """A part that is to be compiled."""

    graph: fx.GraphModule
    tensors: list[Tensor]

    def module(self) -> fx.GraphModule:
        return self.graph

    def examples(self) -> list[Tensor]:
        return self.tensors


def main() -> None:
    """Compile until the input ends."""
    given, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    jobs = SimpleQueue[dict[str, Any]]()
    Thread(target=_read, args=(given, jobs), daemon=True).start()
    while True:
        job = jobs.get()
        try:
            compiled = compile_job(job, lambda number, count: _answer(answers, {"part": number}))
            _answer(answers, {"compiled": compiled})
        except Exception as error:  # the other process compiles then
            _answer(answers, {"failed": first_line(error)})


def _read(given: BinaryIO, jobs: SimpleQueue[dict[str, Any]]) -> None:
    """Take jobs, and end the process with the input, also while something is compiled."""
    try:
        while True:
            jobs.put(pickle.load(given))
    finally:
        os._exit(0)


def _answer(answers: BinaryIO, what: Mapping[str, Any]) -> None:
    answers.write(json.dumps(what).encode() + b"\n")
    answers.flush()


def compile_job(job: Mapping[str, Any], on_part: Callable[[int, int], None]) -> int:
    """Compile the parts of a step. Returns how many of them were not on disk before.

    Args:
        job: what `lower.background.message_of` made.

    Raises RuntimeError where this process would compile other code than the one that asks.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = job["folder"]
    apply_settings(job["settings"])
    device, parts = torch.device(job["device"]), Parts()
    if device.type == "cpu":
        make_cpp_compiler_ready()
    if digest(environment(device)) != job["environment"]:
        raise RuntimeError("what code depends on is not the same in both processes")
    given = [_Given(graph_of(form), examples_of(examples)) for form, examples, _ in job["parts"]]
    for each, (_, _, others) in zip(given, job["parts"], strict=True):
        if others:
            parts.note(each, job["random"], others)
    before = graphs_from_disk()
    compiled = compile_parts(given, job["random"], parts, job["all_sizes"], on_part=on_part)
    assert len(compiled) == len(given)  # code is there as long as something holds it
    return max(0, parts.compiled - (graphs_from_disk() - before))


if __name__ == "__main__":
    main()
