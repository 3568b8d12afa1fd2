"""The C++ compiler is made ready beside other work, from the moment Dynamo begins to trace.

Inductor changes the flags of an instruction set while it tries them: two threads that ask at once leave the wrong
ones behind, and what they compile is found by no later process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moeca_compile import backend, compiler_ready
from moeca_compile._torch_private import (
    compile_cpp,
    cpp_compiler,
    cpp_compiler_is_busy,
    make_cpp_compiler_ready,
    wait_for_cpp_compiler,
)
from moeca_compile.ops.cpu import library as cpu
from tests.harness import Captured, replace_inductor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of the compiler, in order; it needs a moment to be made ready."""
    found: list[str] = []

    def load_pybinding(*_: Any) -> None:
        threading.Event().wait(0.1)
        found.append("ready")

    def load(source: str) -> Any:
        found.append(source)
        raise RuntimeError("no compiler")

    for name, value in (("_BINDINGS", {"load_pybinding": load_pybinding}), ("_CPP", {"load": load})):
        monkeypatch.setattr(cpp_compiler, name, SimpleNamespace(value=SimpleNamespace(**value)))
    monkeypatch.setattr(cpp_compiler, "_threads", [])
    yield found
    wait_for_cpp_compiler()


def test_it_is_made_ready_beside_other_work_and_once(calls: list[str]) -> None:
    for _ in range(2):
        make_cpp_compiler_ready()
        calls.append("else")
        wait_for_cpp_compiler()
    assert calls == ["else", "ready", "else"]


def test_what_is_compiled_meanwhile_waits(calls: list[str]) -> None:
    make_cpp_compiler_ready()
    with pytest.raises(RuntimeError, match="no compiler"):
        compile_cpp("mine")
    assert calls == ["ready", "mine"]


@pytest.mark.parametrize("begun_before", [False, True])
def test_what_follows_is_called_once_in_a_thread_and_may_compile(calls: list[str], begun_before: bool) -> None:
    def then() -> None:
        assert not cpp_compiler_is_busy()
        calls.append(threading.current_thread().name)
        compile_cpp("ours")

    if begun_before:
        make_cpp_compiler_ready()
    for _ in range(2):
        make_cpp_compiler_ready(then)
        assert cpp_compiler_is_busy()
    wait_for_cpp_compiler()
    make_cpp_compiler_ready(then)
    assert not cpp_compiler_is_busy() and calls == ["ready", "moeca_compile C++", "ours"]


def test_torchs_ops_run_until_it_is_ready(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(grouped_linear_float32=SimpleNamespace(argtypes=()))
    monkeypatch.setattr(cpu, "library", lambda source: kernels)
    rows, weights = torch.randn(4, 8), [torch.randn(8, 8)]
    make_cpp_compiler_ready()
    assert not cpu.takes(rows, weights, None)
    wait_for_cpp_compiler()
    assert cpu.takes(rows, weights, None)


def test_a_compiler_that_fails_is_left_to_inductor(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_pybinding(*_: Any) -> None:
        raise OSError("g++ not found")

    monkeypatch.setattr(cpp_compiler._BINDINGS.value, "load_pybinding", load_pybinding)
    make_cpp_compiler_ready(lambda: calls.append("then"))
    wait_for_cpp_compiler()
    assert calls == ["then"]


# --- who asks for it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lowering", "asked"), [("inductor", ["ready", "grouped_linear"]), ("eager", [])])
def test_only_what_inductor_compiles_asks_for_it(
    lowering: str, asked: list[str], calls: list[str], small_graph: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_inductor(monkeypatch)
    monkeypatch.setattr(backend, "library", lambda source: calls.append(source))
    small_graph.loop(lowering=lowering, validate=False)
    wait_for_cpp_compiler()
    assert calls == asked


class Asking(nn.Module):
    """Notes, while Dynamo traces it, how often the compiler was asked for."""

    def __init__(self, asked: list[None]) -> None:
        super().__init__()
        self.linear, self.asked, self.seen = nn.Linear(4, 4), asked, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = len(self.asked)
        return self.linear(x)


@pytest.mark.parametrize(
    ("chosen", "times"),
    [
        ({"backend": "moeca"}, 1),
        ({"backend": "moeca", "options": {"recipe": "none"}}, 1),
        ({"backend": backend.moeca_backend}, 1),
        ({"backend": "moeca", "options": {"lowering": "eager"}}, 0),
        ({"backend": "eager"}, 0),
    ],
)
def test_it_is_asked_for_when_dynamo_begins(
    chosen: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_inductor(monkeypatch)
    asked: list[None] = []
    monkeypatch.setattr(compiler_ready, "make_cpp_compiler_ready", lambda: asked.append(None))
    model = Asking(asked).eval()
    with torch.no_grad():
        torch.compile(model, **chosen)(torch.randn(2, 4))
    assert model.seen == times


# --- the machine's vectors -----------------------------------------------------------------------------------------


class Kind:
    """A kind of vectors as Inductor has it. While it is tried its flags are others."""

    def __init__(self, name: str, works: bool, tried: list[str]) -> None:
        self.name, self.works, self.tried, self.flags = name, works, tried, "right"

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        if self.name not in self.tried:
            assert self.flags == "right"
            self.flags = "tried"
            threading.Event().wait(0.02)
            self.flags = "right"
            self.tried.append(self.name)
        return self.works


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that were tried, in order, of a machine with three, where the compiler cannot use the best one."""
    module, found = torch._inductor.cpu_vec_isa, list[str]()
    kinds = [Kind("avx512 amx", False, found), Kind("avx512", True, found), Kind("avx2", True, found)]
    monkeypatch.setattr(module, "supported_vec_isa_list", [*kinds, Kind("asimd", True, found)])
    monkeypatch.setattr(module, "x86_isa_checker", lambda: ["avx2", "avx512", "amx"])
    monkeypatch.setattr(module, "valid_vec_isa_list", cpp_compiler._VECTORS.value)
    monkeypatch.setattr(cpp_compiler.sys, "platform", "linux")
    monkeypatch.setattr(cpp_compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    cpp_compiler._have_vectors_asked_for_once()
    return found


def test_the_first_kind_that_works_is_taken_and_no_further_one_tried(tried: list[str]) -> None:
    assert str(torch._inductor.cpu_vec_isa.pick_vec_isa()) == "avx512"
    assert tried == ["avx512 amx", "avx512"]


def test_another_kind_is_tried_where_it_is_asked_for(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert str(torch._inductor.cpu_vec_isa.pick_vec_isa()) == "avx2"
    assert [str(kind) for kind in torch._inductor.cpu_vec_isa.valid_vec_isa_list()] == ["avx512", "avx2"]
    assert len(torch._inductor.cpu_vec_isa.valid_vec_isa_list()) == 2


def test_threads_that_ask_at_once_wait_for_each_other(tried: list[str]) -> None:
    picked: list[tuple[str, str]] = []

    def pick() -> None:
        kind = torch._inductor.cpu_vec_isa.pick_vec_isa()
        picked.append((str(kind), kind.flags))

    threads = [threading.Thread(target=pick) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert picked == [("avx512", "right")] * 4 and tried == ["avx512 amx", "avx512"]


@pytest.mark.slow  # each kind takes 3 s
def test_what_works_is_what_inductor_finds_by_itself() -> None:
    make_cpp_compiler_ready()
    module, alone = torch._inductor.cpu_vec_isa, cpp_compiler._VECTORS.value()
    assert module.pick_vec_isa() is next(iter(alone), module.invalid_vec_isa)
    assert all(one is other for one, other in zip(module.valid_vec_isa_list(), alone, strict=True))
