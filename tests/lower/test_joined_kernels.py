"""The C++ kernels of a graph are compiled as one file, and where they cannot be, one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import fresh_cache

from moeca_compile._torch_private import compile_graph, cpp_kernels, joined_kernels, trace_to_graph

pytestmark = pytest.mark.smoke


def two_kernels(x: Tensor, weight: Tensor) -> list[Tensor]:
    """A product keeps what is before it and what is after it in kernels of their own."""
    return [(x.sin() + 1) @ weight, ((x.sin() + 1) @ weight).cos() * 2]


@pytest.fixture
def given() -> tuple[fx.GraphModule, list[Tensor]]:
    inputs = [torch.randn(24, 32), torch.randn(32, 40)]
    return trace_to_graph(two_kernels, *inputs), inputs


@pytest.fixture
def kernels() -> Iterator[Callable[[], int]]:
    """How many files with kernels were compiled since the test began."""
    with fresh_cache():
        yield lambda: len([*Path(cache_dir()).rglob("*.main.so")])


def compiled(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    with joined_kernels():
        return compile_graph(gm, inputs)


def assert_right(code: Callable[..., Any], inputs: list[Tensor]) -> None:
    torch.testing.assert_close(list(code(*inputs)), two_kernels(*inputs))


def test_all_kernels_of_a_graph_are_one_file(
    given: tuple[fx.GraphModule, list[Tensor]], kernels: Callable[[], int]
) -> None:
    assert_right(compiled(*given), given[1])
    assert kernels() == 1


def test_one_compile_thread_does_not_wait_for_itself(
    given: tuple[fx.GraphModule, list[Tensor]], kernels: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.codecache, "LOCK_TIMEOUT", 5)  # then kernels are compiled one by one
    with torch._inductor.config.patch(compile_threads=1):
        assert_right(compiled(*given), given[1])
    assert kernels() == 1


def test_graphs_share_no_file_and_each_has_its_own_functions(kernels: Callable[[], int]) -> None:
    inputs = [torch.randn(24, 32), torch.randn(32, 40)]
    other = trace_to_graph(lambda x, w: [(x.exp() @ w).tanh()], *inputs)
    with joined_kernels():
        codes = [compile_graph(gm, inputs) for gm in (trace_to_graph(two_kernels, *inputs), other)]
    assert_right(codes[0], inputs)
    torch.testing.assert_close(codes[1](*inputs)[0], (inputs[0].exp() @ inputs[1]).tanh())
    assert kernels() == 2


def test_outside_each_kernel_is_a_file(
    given: tuple[fx.GraphModule, list[Tensor]], kernels: Callable[[], int]
) -> None:
    assert_right(compile_graph(*given), given[1])
    assert kernels() == 2


@pytest.mark.parametrize("fault", ["no C++", "raises"])
def test_kernels_that_are_no_file_together_are_compiled_one_by_one(
    fault: str,
    given: tuple[fx.GraphModule, list[Tensor]],
    kernels: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def joined(texts: Any) -> str:
        if fault == "raises":
            raise ValueError(fault)
        return fault

    monkeypatch.setattr(cpp_kernels, "joined", joined)
    assert_right(compiled(*given), given[1])
    assert kernels() == 2


def test_a_kernel_with_macros_stays_by_itself() -> None:
    plain = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float* x) { *x = 1; }\n'
    assert cpp_kernels._with_binding(["float*"], plain) is not None
    assert cpp_kernels._with_binding(["float*"], "#define N 4\n" + plain) is None
    assert cpp_kernels._with_binding(["float*"], plain + 'extern "C" void more() {}\n') is None


def test_what_another_thread_compiles_meanwhile_is_left_alone(kernels: Callable[[], int]) -> None:
    source = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float* x) {{ *x = {}; }}\n'
    scope: dict[str, Any] = {}

    def compile_in_thread() -> None:
        mine = AsyncCompile()
        scope.update({f"kernel_{n}": mine.cpp_pybinding(["float*"], source.format(n)) for n in (1, 2)})
        mine.wait(scope)

    with joined_kernels():
        thread = threading.Thread(target=compile_in_thread)
        thread.start()
        thread.join()
    out = torch.zeros(1)
    scope["kernel_2"](out)
    assert out.item() == 2
    assert kernels() == 2
