"""Whether the code being traced is traced for this package's backend."""

from __future__ import annotations

import logging

import torch
from torch.utils.weak import WeakIdKeyDictionary

from moeca_compile._torch_private import (
    calls_ours,
    compilation,
    hand_over_whole,
    is_sharded,
    missing,
    outermost_module,
    subclass_weight,
    traces_for_us,
)
from moeca_compile.capture.refusals import warn_once
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)
FAILED = (
    "asking for whom Dynamo traces failed ({0}), so MoE layers run as under plain torch.compile. Please report it"
)

_answers = WeakIdKeyDictionary()
"""By compilation: each layer asks, and looking through all weights of the model for each took a tenth of capture."""


@torch.compiler.assume_constant_result
def tracing_for_moeca() -> bool:
    """While Dynamo traces: whether it does so for a backend of ours (`_moeca_backend = True`) or one that calls ours.

    Dynamo runs this at trace time and takes the answer for a constant; its caches are kept per backend. Never where
    the backend leaves the model to torch.compile, because torch lacks what it needs, or a weight is no plain tensor
    or sharded.
    """
    under_way = compilation()
    if under_way is None:
        return False
    if under_way not in _answers:
        try:
            _answers[under_way] = _is_for_moeca()
        except Exception as error:  # Dynamo would not go on
            _log.debug("asking for whom Dynamo traces failed", exc_info=True)
            warn_once(FAILED.format(first_line(error)))
            _answers[under_way] = False
    answer: bool = _answers[under_way]
    return answer


def _is_for_moeca() -> bool:
    if not (traces_for_us() or calls_ours()) or missing():
        return False
    model = outermost_module()
    if subclass_weight(model) is not None or is_sharded(model):
        return False
    hand_over_whole()
    return True
