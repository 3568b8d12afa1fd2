from __future__ import annotations

import pytest
import torch

from moeca_compile import capture
from moeca_compile.capture.install import wrap
from moeca_compile.capture.refusals import forget_refusals
from moeca_compile.capture.trust import forget_verdicts
from moeca_compile.capture.wrapping import forget_orders


@pytest.fixture(autouse=True)
def fresh_capture() -> None:
    """Capture is installed, has seen all classes as in a first compilation, and remembers nothing of other tests."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    forget_refusals()
    forget_verdicts()
    forget_orders()
    capture.install()
    wrap()
