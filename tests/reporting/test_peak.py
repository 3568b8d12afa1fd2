"""The peak of memory in the report: the allocator's on CUDA, unknown with a reason elsewhere."""

from __future__ import annotations

import torch

from moeca_compile.reporting.peak import peak_memory


def test_on_a_cpu_nothing_is_counted_and_the_report_says_why():
    found = peak_memory(torch.device("cpu"), 100)
    assert found["peak_bytes"] is None
    assert "bench.memory" in found["peak_measured"]


def test_on_cuda_it_is_the_allocators_peak_less_the_weights(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 300)
    found = peak_memory(torch.device("cuda", 0), 100)
    assert found["peak_bytes"] == 200
    assert "allocator" in found["peak_measured"]


def test_without_a_graph_there_is_nothing_to_say():
    assert peak_memory(None, 0) == {}
