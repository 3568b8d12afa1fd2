"""The C++ compiler is made ready beside other work, and nobody else asks Inductor for it meanwhile.

Inductor changes the flags of an instruction set while it tries them: two threads that ask at once leave the wrong
ones behind, and what they compile is found by no later process.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeca_compile import backend
from moeca_compile._torch_private import compile_cpp, cpp_compiler, cpp_compiler_is_busy, cpp_compiler_made_ready
from moeca_compile.ops.cpu import library as cpu
from tests.harness import Captured, replace_inductor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
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
    return found


def test_it_is_ready_at_the_end_and_made_so_once(calls: list[str]) -> None:
    for _ in range(2):
        with cpp_compiler_made_ready(True):
            calls.append("else")
        calls.append("end")
    assert calls == ["else", "ready", "end", "else", "end"]


def test_what_is_compiled_meanwhile_waits(calls: list[str]) -> None:
    with cpp_compiler_made_ready(True), pytest.raises(RuntimeError, match="no compiler"):
        compile_cpp("mine")
    assert calls == ["ready", "mine"]


def test_what_follows_is_called_in_the_thread_and_may_compile(calls: list[str]) -> None:
    def then() -> None:
        assert not cpp_compiler_is_busy()
        calls.append(threading.current_thread().name)
        compile_cpp("ours")

    with cpp_compiler_made_ready(True, then):
        assert cpp_compiler_is_busy()
    assert calls == ["ready", "moeca_compile C++", "ours"]


def test_torchs_ops_run_until_it_is_ready(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(grouped_linear_float32=SimpleNamespace(argtypes=()))
    monkeypatch.setattr(cpu, "library", lambda source: kernels)
    rows, weights = torch.randn(4, 8), [torch.randn(8, 8)]
    with cpp_compiler_made_ready(True):
        assert not cpu.takes(rows, weights, None)
    assert cpu.takes(rows, weights, None)


def test_it_is_ready_where_the_work_beside_fails(calls: list[str]) -> None:
    with pytest.raises(ValueError, match="beside"), cpp_compiler_made_ready(True):
        raise ValueError("beside")
    assert calls == ["ready"]


def test_a_compiler_that_fails_is_left_to_inductor(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_pybinding(*_: Any) -> None:
        raise OSError("g++ not found")

    monkeypatch.setattr(cpp_compiler._BINDINGS.value, "load_pybinding", load_pybinding)
    with cpp_compiler_made_ready(True):
        calls.append("else")
    assert calls == ["else"]


@pytest.mark.parametrize(("lowering", "asked"), [("inductor", ["ready", "grouped_linear"]), ("eager", [])])
def test_only_what_inductor_compiles_asks_for_it(
    lowering: str, asked: list[str], calls: list[str], small_graph: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_inductor(monkeypatch)
    monkeypatch.setattr(backend, "library", lambda source: calls.append(source))
    small_graph.loop(lowering=lowering, validate=False)
    assert calls == asked
