"""Every kernel, compiled for sm_80, sm_90 and sm_100 without a GPU: registers, spills, shared memory, loads."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its tools for x86-64 only")

ROOT = Path(__file__).parents[3]

SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of shared memory that a multiprocessor has."""

STACK = {80: 16, 90: 16, 100: 40}
"""Bytes a thread that ptxas may put aside where it saves registers: some values, no spill of an accumulator."""

KERNELS = {
    "sort_kernel",
    "product_kernel",
    "output_kernel",
    "fixed_k_kernel",
    "place_kernel",
    "variable_k_kernel",
    "token_kernel",
    "choice_kernel",
}


def compile_ahead(*arguments: str) -> list[dict[str, Any]]:
    """What tests/ops/triton/ahead.py says, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ahead.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(results: list[dict[str, Any]]) -> None:
    """No kernel spills, and all leave room for enough warps."""
    for found in results:
        assert found["local"] == 0 and found["stack"] <= STACK[found["arch"]], found
        # A multiprocessor has four schedulers: with two warps each, one computes while the other waits.
        assert blocks_at_a_time(found) * found["warps"] >= 8, found
        # Weights and rows are what a product waits for: they come 16 bytes at a time, past the registers.
        if found["kernel"] == "product_kernel" and found["aligned"]:
            assert found["wide_copies"] > 0 and found["narrow_copies"] == 0, found
        if found["kernel"] == "product_kernel" and found["dtype"] != "fp32":
            assert found["tensor_cores"] > 0, found


@pytest.mark.slow
def test_what_a_published_model_launches():
    assert architectures_of(compile_ahead("90")) == {90}


@pytest.mark.slow
def test_what_it_launches_on_other_architectures():
    found = architectures_of(compile_ahead())
    assert found in ({80, 90}, {80, 90, 100})  # the last where Triton has its assembler


def architectures_of(results: list[dict[str, Any]]) -> set[int]:
    """Those that every kernel was compiled for, in every dtype, and well."""
    check(results)
    architectures = {found["arch"] for found in results}
    for arch in architectures:
        compiled = {(found["kernel"], found["dtype"]) for found in results if found["arch"] == arch}
        # What sorts branches knows nothing of the rows' dtype, so it is compiled once.
        assert compiled - {("sort_kernel", "bf16")} == {
            (kernel, dtype) for kernel in KERNELS - {"sort_kernel"} for dtype in ("bf16", "fp16", "fp32")
        }
    return architectures


def blocks_at_a_time(found: dict[str, Any]) -> int:
    """Blocks of a kernel that a multiprocessor holds: of each, 1 KiB of shared memory is the system's, and registers
    are given out by eights."""
    registers = -(-found["registers"] // 8) * 8
    return min(SHARED[found["arch"]] // (found["shared"] + 1024), 65536 // (32 * found["warps"] * registers))


@pytest.mark.slow
def test_every_block_size_dtype_and_layout():
    results = compile_ahead("every")
    check(results)
    blocks = {(found["dtype"], found["blocks"]) for found in results if found["kernel"] == "product_kernel"}
    assert len(blocks) >= 5 + 5 + 3
    assert {80, 90} <= {found["arch"] for found in results}
