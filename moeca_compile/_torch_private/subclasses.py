"""Tensors that hold others, such as quantized or sharded weights. Export does not take these."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn


def subclass_among(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[str, Tensor] | None:
    """Name and value of the first such tensor among the inputs of Dynamo's graph; None without any."""
    names = (node.name for node in gm.graph.nodes if node.op == "placeholder")
    return next(((name, value) for name, value in zip(names, inputs, strict=True) if _holds_others(value)), None)


def subclass_weight(module: nn.Module | None) -> tuple[str, Tensor] | None:
    """Name and value of the first such parameter or buffer of a model."""
    if module is None:
        return None
    weights = itertools.chain(module.named_parameters(), module.named_buffers())
    return next(((name, value) for name, value in weights if _holds_others(value)), None)


def _holds_others(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__")


def is_sharded(value: Tensor | nn.Module | None) -> bool:
    """Whether a tensor, or a weight of a model, is divided over processes: by DTensor, or by FSDP.

    FSDP gathers the weights of a module before its forward. They are plain tensors then, at another place each time.
    """
    if isinstance(value, Tensor):
        distributed = sys.modules.get("torch.distributed.tensor")  # nobody has made one before that was imported
        return distributed is not None and isinstance(value, distributed.DTensor)
    if value is None:
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    gathered = fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in value.modules())
    return gathered or any(map(is_sharded, value.parameters()))
