"""Whether the code being traced is traced for this package's backend."""

from __future__ import annotations

import torch

from moeca_compile._torch_private import (
    calls_ours,
    hand_over_whole,
    is_sharded,
    missing,
    outermost_module,
    subclass_weight,
    traces_for_us,
)


@torch.compiler.assume_constant_result
def tracing_for_moeca() -> bool:
    """While Dynamo traces: whether it does so for a backend of ours (`_moeca_backend = True`) or one that calls ours.

    Dynamo runs this at trace time and takes the answer for a constant; its caches are kept per backend. Never where
    the backend leaves the model to torch.compile, because torch lacks what it needs, or a weight is no plain tensor
    or sharded.
    """
    if not (traces_for_us() or calls_ours()) or missing():
        return False
    model = outermost_module()
    if subclass_weight(model) is not None or is_sharded(model):
        return False
    hand_over_whole()
    return True
