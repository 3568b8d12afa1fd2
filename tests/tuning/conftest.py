from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo(traced_once: None) -> Iterator[None]:
    """A tune finds no code that Dynamo gave up for another test, and leaves none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
