"""Live bytes on the CPU: every allocation and every free is seen, whoever makes it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from bench.live_bytes import LiveBytes
from moeca_compile._torch_private import compile_graph, trace_to_graph
from moeca_compile.ops.cpu import library

CPU, KIB = torch.device("cpu"), 1024


def test_tensors_of_aten_are_seen_and_their_frees_too():
    live = LiveBytes(CPU)
    one = torch.empty(KIB, dtype=torch.uint8)
    two = one + one
    assert (live.now, live.peak) == (2 * KIB, 2 * KIB)
    del two
    assert (live.now, live.peak) == (KIB, 2 * KIB)
    live.restart_peak()
    assert live.peak == KIB
    del one
    assert live.now == 0


def test_what_was_there_before_is_the_base():
    before = torch.empty(KIB)
    live = LiveBytes(CPU)
    assert (live.now, live.peak) == (0, 0)
    del before


def test_a_temporary_value_counts_for_the_peak_alone():
    x = torch.ones(KIB, dtype=torch.uint8)
    live = LiveBytes(CPU)
    out = (x + x).mul(x)
    assert (live.now, live.peak) == (KIB, 2 * KIB)
    del out


def test_a_convolution_and_an_empty_tensor_run_as_before():
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 2, 2)
    live = LiveBytes(CPU)
    out, empty = torch.conv2d(x, weight), torch.empty(0)
    assert live.now == out.nbytes + empty.nbytes
    torch.testing.assert_close(out[0, 0, 0, 0], (x[0, :, :2, :2] * weight[0]).sum())


def test_inductors_code_is_seen():
    def function(x: Tensor) -> list[Tensor]:
        return [(x @ x).relu() @ x]  # the first product is a temporary value

    x = torch.randn(32, 32)
    compiled = compile_graph(trace_to_graph(function, x), [x])
    compiled(x)
    live = LiveBytes(CPU)
    (out,) = compiled(x)
    assert live.now == out.nbytes
    assert live.peak >= 2 * out.nbytes


def test_our_cpp_ops_are_seen():
    rows, weight = torch.randn(8, 64), torch.randn(64, 64)
    assert library.takes(rows, [weight], None)
    live = LiveBytes(CPU)
    out = library.grouped_linear(rows, torch.tensor([0, 8]), [weight], None)
    assert live.now == out.nbytes
    assert live.peak > out.nbytes  # its packed rows


def test_other_threads_are_seen():
    found: list[Tensor] = []
    live = LiveBytes(CPU)
    thread = threading.Thread(target=lambda: found.append(torch.empty(KIB, dtype=torch.uint8)))
    thread.start()
    thread.join()
    assert live.now == KIB
