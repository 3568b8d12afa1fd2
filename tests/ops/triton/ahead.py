"""Compile the kernels that the ops launch, for GPUs that need not be there; prints JSON.

    python tests/ops/triton/ahead.py [every] [90]      # for some architectures only

The ops run on CPU tensors at the sizes of a published model, and what they would launch is recorded instead: so the
kernels are compiled for just the arguments, block sizes and specializations that they get. Triton's interpreter must
be off, which is why this is a program of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moeca_compile.ops.triton import blocks, grouped
from moeca_compile.ops.triton import fixed_k as fixed_k_ops
from moeca_compile.ops.triton import variable_k as variable_k_ops
from moeca_compile.ops.triton.activations import SILU
from moeca_compile.ops.triton.attention import attend_rows
from moeca_compile.ops.triton.compaction import sort_by_expert
from moeca_compile.ops.triton.operands import operand
from moeca_compile.ops.triton.routing import choose_experts
from moeca_compile.ops.triton.rows import by_place
from tests.ops.routing_cases import CASES, Choice
from tests.ops.triton.cases import body_of, gelu_mlp, swiglu

ARCHITECTURES = (80, 90, *((100,) if (Path(nvidia.__file__).parent / "bin" / "ptxas-blackwell").exists() else ()))
"""sm_100 has an assembler of its own, which Triton brings from 3.3 on."""

WIDTH, HIDDEN, EXPERTS, K, BATCH, TOKENS, HEADS = 384, 768, 16, 2, 8, 256, 6
"""DSMoE-S-E16 at batch 8."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = TYPES | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is compiled for."""

    kernel: JITFunction[Any]
    signature: dict[str, Any]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]

    @property
    def key(self) -> str:
        parts = (self.kernel.__name__, self.signature, self.constants, self.attributes, self.options)
        return repr(parts)


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Launch]]:
    """Kernels that are launched inside are noted and not run."""
    launches: dict[str, Launch] = {}

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = launch_of(kernel, args, kwargs)
        launches[launch.key] = launch

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = before


def launch_of(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As Triton specializes: 1 and None are constants, multiples of 16 are known to be."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    if "WIDENED" in values:
        values["WIDENED"] = False  # as on a device
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, tuple):
            signature[name] = tuple(f"*{POINTERS[each.dtype]}" for each in value)
            attributes |= {(number, place): [["tt.divisibility", 16]] for place in range(len(value))}
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = f"*{POINTERS[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[number,] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, options)


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes of a multiprocessor: bytes of a block (shared) and of a thread (stack, local).

    wide_copies, narrow_copies: instructions that copy to shared memory asynchronously, 16 bytes a thread or fewer
    tensor_cores: instructions that multiply matrices
    """

    kernel: str
    dtype: str
    arch: int
    blocks: str
    aligned: bool
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    wide_copies: int
    narrow_copies: int
    tensor_cores: int


def compiled(launch: Launch, dtype: torch.dtype, arch: int) -> Compiled:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    used, ptx = resources(result.asm["cubin"]), result.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+),", ptx)
    block = "x".join(str(launch.constants[name]) for name in ("ROWS", "COLUMNS", "DEPTH") if name in launch.constants)
    return Compiled(
        launch.kernel.__name__,
        TYPES[dtype],
        arch,
        block,
        bool(launch.constants.get("ALIGNED")),
        used["REG"],
        used["STACK"],
        used["LOCAL"],
        result.metadata.shared,
        result.metadata.num_warps,
        copies.count("0x10"),
        len(copies) - copies.count("0x10"),
        len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which Triton brings, says of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


# --- what is launched -------------------------------------------------------------------------------------------


def experts(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape in shapes * EXPERTS]


def products(dtype: torch.dtype, width: int) -> None:
    """Both products of SwiGLU at all block sizes: rows gathered and gated; by position."""
    rows, hidden = (torch.empty(BATCH * TOKENS, each, dtype=dtype) for each in (width, 2 * width))
    order = sort_by_expert(torch.zeros(BATCH * TOKENS, K, dtype=torch.int64), None, EXPERTS, K)
    up, down = (
        grouped.Weight(operand(experts([shape], dtype)), None, False)
        for shape in ((2 * width, width), (width, 2 * width))
    )
    for block in blocks.every_entry(dtype, gated=True):
        grouped.grouped_product(rows, order, (up, up), SILU, gather=True, blocks=block)
    for block in blocks.every_entry(dtype, gated=False):
        grouped.grouped_product(hidden, order, (down,), blocks=block)


def sweep(dtype: torch.dtype) -> None:
    """All block sizes; sizes that are no multiples of anything; float32 in TensorFloat-32 besides."""
    for width in (WIDTH, WIDTH - 1):
        products(dtype, width)
    for name in ("48 experts", "softmax of the chosen", "DeepSeek-V3"):
        routers(CASES[name], dtype)
    if dtype == torch.float32:
        torch.set_float32_matmul_precision("high")
        products(dtype, WIDTH)


def routers(case: Choice, dtype: torch.dtype) -> None:
    """A router's choice, with logits and weights in this dtype and scores in it or in float32."""
    logits, bias = (torch.empty(shape, dtype=dtype) for shape in ((BATCH * TOKENS, case.experts), (case.experts,)))
    for scores in {dtype, torch.float32}:
        choice = replace(case, dtype=scores, weight_dtype=dtype)
        choose_experts(logits, bias if case.biased else None, *choice.arguments())


def all_ops(dtype: torch.dtype) -> None:
    """Every op once, with a forecast; an MLP with biases, whose outputs go to their places."""
    chosen, forecast = BATCH * TOKENS // 16, torch.ones(2, 2)
    shapes = [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    gated = (body_of(swiglu, shapes, WIDTH, dtype), experts(shapes, dtype))
    shapes = [(HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)]
    plain = (body_of(gelu_mlp, shapes, WIDTH, dtype), experts(shapes, dtype))
    rows = torch.empty(BATCH * TOKENS, WIDTH, dtype=dtype)
    index = torch.zeros(BATCH * TOKENS, K, dtype=torch.int64)
    fixed_k_ops.fixed_k_outputs([rows], index, plain[1], EXPERTS, plain[0], WIDTH)
    ring = [torch.empty(BATCH, TOKENS, K, WIDTH, dtype=dtype) for _ in range(2)]
    history = torch.ones(BATCH, TOKENS, K, dtype=torch.int32)
    some = (BATCH, chosen // BATCH)
    mask = torch.zeros(*some, K, dtype=torch.bool)
    tokens, weight = torch.zeros(some, dtype=torch.int64), torch.empty(BATCH, TOKENS, K, dtype=dtype)
    fixed_k_ops.refresh_fixed_k(
        ring,
        [rows[:chosen]],
        mask.long(),
        mask,
        tokens,
        weight,
        history,
        forecast,
        gated[1],
        EXPERTS,
        gated[0],
    )
    by_place(rows, sort_by_expert(index[:, :1], None, EXPERTS, 1))
    routed, pool_row = (torch.zeros(BATCH * TOKENS, EXPERTS, dtype=kind) for kind in (torch.bool, torch.int32))
    ring, weight = [slot.flatten(0, 2) for slot in ring], torch.empty(BATCH * TOKENS, EXPERTS, dtype=dtype)
    variable_k_ops.variable_k_outputs([rows], routed, weight, None, *reversed(plain), WIDTH, len(ring[0]))
    variable_k_ops.refresh_variable_k(
        ring, [rows], pool_row, routed, routed, weight, pool_row, forecast, *reversed(gated)
    )
    keys, heads = (
        torch.zeros(BATCH, a, b, WIDTH // HEADS, dtype=dtype) for a, b in ((TOKENS, HEADS), (HEADS, some[1]))
    )
    routers(CASES["DSMoE"], dtype)
    attend_rows(
        keys, keys.clone(), heads, heads, heads, tokens, torch.zeros(some, dtype=torch.bool), None, None, False
    )


def main(every: bool, architectures: Sequence[int]) -> None:
    """What DSMoE-S-E16 launches, with `every` all block sizes; all dtypes in either case."""
    found: dict[str, tuple[Launch, torch.dtype]] = {}
    for dtype in TYPES:
        with recorded() as launches:
            all_ops(dtype)
            if every:
                sweep(dtype)
        found = {key: (launch, dtype) for key, launch in launches.items()} | found
    results = [compiled(launch, dtype, arch) for launch, dtype in found.values() for arch in architectures]
    json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    main("every" in sys.argv[1:], [int(each) for each in sys.argv[1:] if each.isdigit()] or ARCHITECTURES)
