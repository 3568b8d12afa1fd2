from __future__ import annotations

import pytest
import torch

from moeca_compile import capture
from moeca_compile.capture.refusals import forget_refusals


@pytest.fixture(autouse=True)
def fresh_capture() -> None:
    """Capture remembers no refusals of other tests."""
    torch._dynamo.reset()
    forget_refusals()
    capture.install()
