from __future__ import annotations

import pytest
import torch

from moeca_compile import capture
from moeca_compile.capture.refusals import forget_refusals
from moeca_compile.runtime import specialization
from tests.harness import EagerProgram


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run as eager functions and nothing reaches Inductor; capture remembers no refusals of other tests.

    Unlike `eager_steps` no graph is kept: there are too many of them.
    """
    monkeypatch.setattr(specialization, "Program", EagerProgram)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda gm, inputs: gm.forward)
    torch._dynamo.reset()
    forget_refusals()
    capture.install()
