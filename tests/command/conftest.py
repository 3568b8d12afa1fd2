from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """A command is a process of its own: it finds no code that Dynamo gave up for another test, and leaves none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
