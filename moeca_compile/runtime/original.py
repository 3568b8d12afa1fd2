"""The model's own graph, which runs where ours cannot."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import fx

from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.without_markers import without_markers
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)

FAILED = (
    "{0} failed ({1}). The model runs as under plain torch.compile and nothing is cached, so sampling is no faster. "
    "The DEBUG log of moeca_compile has the traceback, and the option dump writes the graph. Please report it"
)


class Original:
    """Dynamo's graph as plain torch.compile compiles it, at its first call.

    Args:
        gm: the graph, copied here, since passes edit it.
        lowering: "eager" to run it op by op.
    """

    def __init__(self, gm: fx.GraphModule, lowering: str) -> None:
        self.gm, self.graph, self.lowering = gm, copy.deepcopy(gm.graph), lowering

    def __call__(self, *inputs: Any) -> Any:
        try:
            return self._compiled(*inputs)
        except Exception:
            if self._compiled is self._module:
                raise
            outputs = self._module(*inputs)  # raises what the model itself raises
            _log.debug("torch.compile failed on the original graph, which runs op by op", exc_info=True)
            self._compiled = self._module
            return outputs

    @cached_property
    def _module(self) -> fx.GraphModule:
        return without_markers(fx.GraphModule(self.gm, self.graph))

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return self._module if self.lowering == "eager" else torch.compile(self._module)


def warn_of_failure(stage: str, error: Exception, notes: Notes) -> None:
    """Say that something of ours failed, and that the model itself runs."""
    _log.debug("%s failed", stage, exc_info=error)
    notes.warn(FAILED.format(stage, first_line(error)))
