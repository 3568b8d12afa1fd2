"""A program of several units, and how they are compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import LambdaFuture
from torch._inductor.utils import fresh_cache

from moeca_compile._torch_private import compile_graph, compiled_side_by_side, trace_to_graph


@pytest.fixture(autouse=True)
def two_compilers() -> Iterator[None]:
    """On a single core Inductor compiles each kernel at once."""
    with torch._inductor.config.patch(compile_threads=2):
        yield


def test_graphs_compiled_side_by_side_run_once_all_are_there():
    x = torch.randn(40)
    functions = [lambda x: [(x + 1.0).sin()], lambda x: [(x * 2.0).cos()]]
    with fresh_cache(), torch.no_grad():
        with compiled_side_by_side():
            compiled = [compile_graph(trace_to_graph(function, x), [x]) for function in functions]
            with pytest.raises(TypeError, match="not callable"):  # loud, were one to be run too early
                compiled[0](x)
        for run, function in zip(compiled, functions, strict=True):
            torch.testing.assert_close(run(x)[0], function(x)[0])


def test_another_thread_waits_for_its_own_kernels_and_an_error_leaves_nothing_behind():
    wait, mine, others = AsyncCompile.wait, kernels(), kernels()
    with pytest.raises(ZeroDivisionError), compiled_side_by_side():
        AsyncCompile.wait(AsyncCompile(), mine)
        other = threading.Thread(target=AsyncCompile.wait, args=(AsyncCompile(), others))
        other.start()
        other.join()
        assert others == {"kernel": 5}
        assert mine != {"kernel": 5}
        raise ZeroDivisionError
    assert mine == {"kernel": 5}
    assert AsyncCompile.wait is wait


def test_a_kernel_that_fails_does_not_keep_others_from_being_waited_for():
    def failing() -> None:
        raise ZeroDivisionError

    good, bad = kernels(), {"kernel": LambdaFuture(failing)}
    with pytest.raises(ZeroDivisionError), compiled_side_by_side():
        for scope in (bad, good, bad):
            AsyncCompile.wait(AsyncCompile(), scope)
    assert good == {"kernel": 5}


def kernels() -> dict[str, Any]:
    """The globals of a graph's code with one kernel, which will be the number 5."""
    return {"kernel": LambdaFuture(lambda: 5)}
