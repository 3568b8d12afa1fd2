"""The kernels behind the ops: through the dispatcher, without Triton, and in the report where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.library import _scoped_library

from moeca_compile.lower.waits import why_experts_wait
from moeca_compile.notes import Notes
from moeca_compile.ops import triton as kernels
from moeca_compile.ops.markers import NAMESPACE
from moeca_compile.runtime.loop import StepLoop
from tests.harness import Captured, captured
from tests.models import make_inputs, make_model
from tests.ops.triton import test_attention as attention_cases
from tests.ops.triton import test_fixed_k as fixed_k_cases
from tests.ops.triton import test_variable_k as variable_k_cases
from tests.ops.triton.cases import BODIES, BODY_ROUNDINGS, DEVICE, WIDTH, assert_within

OPS = ("fixed_k_outputs", "refresh_fixed_k", "attend_rows", "variable_k_outputs", "refresh_variable_k")


@pytest.fixture
def on_device(monkeypatch):
    """Calls an op's implementation on CUDA through the dispatcher, which checks it against the schema."""
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        yield lambda name: getattr(torch.ops.moeca, name)
        return
    with _scoped_library(NAMESPACE, "FRAGMENT") as library:
        kernels.register(library)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        yield lambda name: lambda *args: getattr(torch.ops.moeca, name).default.redispatch(keys, *args)


def test_fixed_k_ops(on_device):
    found, expected = (fixed_k_cases.make_case() for _ in range(2))
    out, norms = on_device("refresh_fixed_k")(*found.arguments())
    wanted, wanted_norms = torch.ops.moeca.refresh_fixed_k(*expected.arguments())
    slots = zip(found.ring, expected.ring, strict=True)
    for one, other in ((out, wanted), (norms, wanted_norms), *slots):
        assert_within(one, other, 2 * BODY_ROUNDINGS)
    rows, index = found.rows, found.index.flatten(0, 1)
    arguments = (rows, index, found.parameters, found.experts, found.body, WIDTH)
    assert_within(
        on_device("fixed_k_outputs")(*arguments), torch.ops.moeca.fixed_k_outputs(*arguments), BODY_ROUNDINGS
    )


def test_variable_k_ops(on_device):
    case = variable_k_cases.make_case(6, 4, 12, 0.6, 2, BODIES["swiglu"], torch.float32, 0)
    arguments = case.all_arguments(True)
    for one, other in zip(
        on_device("variable_k_outputs")(*arguments), torch.ops.moeca.variable_k_outputs(*arguments), strict=True
    ):
        assert_within(one, other, 4 * BODY_ROUNDINGS, torch.float32)

    def refreshed(op) -> list[Tensor]:
        ring = case.new_ring()
        return [*op(*case.refresh_arguments(ring)), *ring]

    for one, other in zip(
        refreshed(on_device("refresh_variable_k")), refreshed(torch.ops.moeca.refresh_variable_k), strict=True
    ):
        assert_within(one, other, 4 * BODY_ROUNDINGS, torch.float32)


def test_attention(on_device):
    sizes = (2, 3, 3, 7, 4, 8, 8, torch.float32, torch.float32, 0.5, 0)
    found, expected = (attention_cases.make_case(*sizes) for _ in range(2))
    out = on_device("attend_rows")(*found, None, None, False)
    assert torch.equal(out, torch.ops.moeca.attend_rows(*expected, None, None, False))
    assert torch.equal(found[0], expected[0])


WITHOUT_TRITON = f"""
import sys, torch
torch.version.cuda = "12.8"                     # as in a build for CUDA
sys.modules["triton"] = None                    # as where it is not installed
import moeca_compile
from moeca_compile.ops import triton as kernels
has = lambda: [torch._C._dispatch_has_kernel_for_dispatch_key("moeca::" + op, "CUDA") for op in {OPS!r}]
assert not kernels.available() and not any(has())
assert "no kernels" in kernels.why_not(torch.device("cuda"), "", [], [], 1)
assert kernels.why_not(torch.device("cpu"), "", [], [], 1) is None
del sys.modules["triton"]
if not kernels.available():                     # it is not installed indeed
    sys.exit()
library = torch.library.Library("moeca", "FRAGMENT")
kernels.register(library)
assert all(has())
"""


def test_the_package_needs_no_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


def as_on_a_device(loop: StepLoop, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of when a specialization is planned on a device."""
    monkeypatch.setattr(kernels, "available", lambda: True)
    notes = Notes()
    why_experts_wait(loop.compiled.regions, torch.device("cuda"), notes)
    return notes.warnings


def test_nothing_is_said_of_experts_that_kernels_run(graph: Captured, monkeypatch):
    loop = graph.loop(validate=False)
    assert len(loop.compiled.regions.bodies) == 2
    assert loop.notes.warnings == []
    assert as_on_a_device(loop, monkeypatch) == []


@pytest.mark.filterwarnings("ignore:moeca")
def test_experts_that_wait_are_in_the_report_with_their_reason(monkeypatch):
    model = make_model().double()
    noise, labels = make_inputs(model)
    loop = captured(model, noise.double(), torch.ones(len(noise)).double(), labels).loop(validate=False)
    warnings = as_on_a_device(loop, monkeypatch)
    assert len(warnings) == 2
    assert all("wait for the device at every step" in text and "float64" in text for text in warnings)
