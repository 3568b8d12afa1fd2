"""Whether the code being traced is traced for this package's backend."""

from __future__ import annotations

import torch

from moeca_compile._torch_private import missing, tracing_backend


@torch.compiler.assume_constant_result
def tracing_for_moeca() -> bool:
    """While Dynamo traces: whether it does so for a backend of ours, one with `_moeca_backend = True`.

    Dynamo runs this at trace time and takes the answer for a constant; its caches are kept per backend. Never where
    torch lacks what the backend needs: it could make nothing of the markers then.
    """
    ours = any(getattr(backend, "_moeca_backend", False) is True for backend in tracing_backend())
    return ours and not missing()
