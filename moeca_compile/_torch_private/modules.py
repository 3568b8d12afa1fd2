"""Attributes of modules and their weights: whether one is compiled, has hooks, was changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def compiled_module(compiled: Any) -> nn.Module | None:
    """The module behind what `torch.compile` returned, or itself if it was compiled in place; else None.

    That of a compiled method is the one that the method is bound to.
    """
    inner = getattr(compiled, "_orig_mod", None)
    if inner is None and not isinstance(compiled, nn.Module):
        bound = getattr(getattr(compiled, "_torchdynamo_orig_callable", None), "__self__", None)
        return bound if isinstance(bound, nn.Module) else None
    in_place = compiled_call(compiled) is not None
    return inner if inner is not None else compiled if in_place else None


def compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` made last, None where the module is not compiled in place."""
    return getattr(module, "_compiled_call_impl", None)


def restore_compiled_call(module: nn.Module, earlier: Any) -> None:
    """Let calls of the module run what `compiled_call` gave earlier. torch has no public way back."""
    module._compiled_call_impl = earlier


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after the module's forward; it is taken to be where nobody can tell."""
    hooks = (getattr(module, name, True) for name in ("_forward_hooks", "_forward_pre_hooks"))
    return any(map(bool, hooks))


def version_of(tensor: Tensor) -> int:
    """A number that grows when a tensor is changed in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else getattr(tensor, "_version", 0)
