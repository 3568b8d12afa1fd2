"""Calls of a logger that logs nothing break no graph; what is logged is."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tests.harness import RecordingBackend

logger = logging.getLogger("tests.idle_logging")


class Logs(nn.Module):
    def forward(self, x):
        y = x * 2
        logger.info("rows of %s", x.shape)
        if x.shape[-1] != 4:
            logger.warning("an odd width")
        return y + 1


@pytest.fixture(autouse=True)
def level():
    yield
    logger.setLevel(logging.NOTSET)


def graphs_of(x: torch.Tensor, ours: bool = True) -> int:
    backend, model = RecordingBackend(ours=ours), Logs()
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    return len(backend.graphs)


def test_a_call_that_logs_nothing_breaks_no_graph():
    logger.setLevel(logging.WARNING)
    assert graphs_of(torch.randn(3, 4)) == 1


def test_what_is_logged_is_logged_at_every_call(caplog):
    logger.setLevel(logging.WARNING)
    with caplog.at_level(logging.WARNING, logger.name):
        assert graphs_of(torch.randn(3, 5)) > 1
    assert [record.message for record in caplog.records] == ["an odd width"] * 2  # compiled, and eager


def test_other_backends_trace_as_they_did():
    logger.setLevel(logging.WARNING)
    assert graphs_of(torch.randn(3, 4), ours=False) > 1
