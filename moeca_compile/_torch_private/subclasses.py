"""Tensors that hold others, such as quantized weights. Export does not take these."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn


def subclass_among(module: nn.Module | None, gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, str] | None:
    """Name and type of the first such tensor of a model, or among the inputs of Dynamo's graph; None without any."""
    found = subclass_weight(module)
    names = (node.name for node in gm.graph.nodes if node.op == "placeholder")
    others = ((name, type(value).__name__) for name, value in zip(names, inputs, strict=True) if _holds_others(value))
    return found or next(others, None)


def subclass_weight(module: nn.Module | None) -> tuple[str, str] | None:
    """Name and type of the first such parameter or buffer of a model."""
    if module is None:
        return None
    weights = itertools.chain(module.named_parameters(), module.named_buffers())
    return next(((name, type(value).__name__) for name, value in weights if _holds_others(value)), None)


def _holds_others(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__")
