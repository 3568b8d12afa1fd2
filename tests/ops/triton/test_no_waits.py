"""The ops on CUDA call nothing that would ask a device for numbers; the same check finds the ATen functions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeca_compile.ops import attention as attention_reference
from moeca_compile.ops import fixed_k as fixed_k_reference
from moeca_compile.ops import variable_k as variable_k_reference
from tests.ops.routing_cases import CASES, make_inputs
from tests.ops.triton.cases import BODIES, DEVICE, WIDTH

pytest.importorskip("triton")
from moeca_compile.ops.triton import attention, fixed_k, routing, variable_k
from tests.ops.triton import test_attention as attention_cases
from tests.ops.triton import test_fixed_k as fixed_k_cases
from tests.ops.triton import test_variable_k as variable_k_cases

WAITS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
"""What marks ops whose result, or its shape, the host has to read. torch.bincount bears neither."""


class Waits(TorchDispatchMode):
    """Notes the ops that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if WAITS & set(op.tags) or "bincount" in str(op):
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    with Waits() as mode:
        yield mode.found


def fixed_k_calls(module: Any, name: str) -> list[Callable[[], Any]]:
    case = fixed_k_cases.make_case(body=BODIES[name])
    full = (case.rows, case.index.flatten(0, 1), case.parameters, case.experts, case.body, WIDTH)
    out = torch.empty_like(module.fixed_k_outputs(*full))
    return [
        lambda: module.refresh_fixed_k(*case.copy().arguments()),
        lambda: module.fixed_k_outputs(*full),
        lambda: module.fixed_k_outputs_into(out, *full[:-1]),
    ]


def variable_k_calls(module: Any, name: str) -> list[Callable[[], Any]]:
    case = variable_k_cases.make_case(6, 4, 12, 0.6, 2, BODIES[name], torch.float32, 0)
    return [
        lambda: module.variable_k_outputs(*case.all_arguments(False)),
        lambda: module.variable_k_outputs_into(case.ring[0], *case.all_arguments(True)[:-2]),
        lambda: module.refresh_variable_k(*case.refresh_arguments(case.ring)),
    ]


def attention_calls(module: Any) -> list[Callable[[], Any]]:
    case = attention_cases.make_case(2, 3, 3, 7, 4, 8, 8, torch.float32, torch.float32, 0.5, 0)
    return [lambda: module.attend_rows(*case, None, None, False)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["swiglu", "layer norm", "modulated", "one of two"])
def test_experts(name):
    """A body of products alone, one with a norm, one with a second row a token, one that ends in a view."""
    for call in (*fixed_k_calls(fixed_k, name), *variable_k_calls(variable_k, name)):
        call()  # tables of addresses are there from the first step on
        with waits() as found:
            call()
        assert found == []


def test_attention():
    (call,) = attention_calls(attention)
    with waits() as found:
        call()
    assert found == []


def test_a_router():
    case = CASES["DeepSeek-V3"]
    with waits() as found:
        routing.choose_experts(*make_inputs(9, case, torch.float32, DEVICE), *case.arguments())
    assert found == []


@pytest.mark.parametrize(
    "call",
    [
        *fixed_k_calls(fixed_k_reference, "swiglu"),
        *variable_k_calls(variable_k_reference, "swiglu"),
        *attention_calls(attention_reference),
    ],
)
def test_the_reference_waits(call):
    with waits() as found:
        call()
    assert found
