"""What of a process's settings decides what Inductor writes, for another process that compiles the same."""

from __future__ import annotations

from typing import Any

import torch

from moeca_compile._torch_private.kernels import float32_matmul_precision
from moeca_compile._torch_private.lookup import Private

_AT_ONCE = "the option background has no effect"
_INDUCTOR = Private("torch._inductor.config", _AT_ONCE)
_FUNCTORCH = Private("torch._functorch.config", _AT_ONCE)
_DEVICES = ("cpu", "cuda")
_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def current_settings() -> dict[str, Any]:
    """The settings that are in force, which can be pickled. Raises LookupError where torch does not say them all."""
    if _INDUCTOR.value is None or _FUNCTORCH.value is None:
        raise LookupError("torch does not have its configuration where it is known to be")
    return {
        "inductor": _INDUCTOR.value.save_config_portable(ignore_private_configs=False),
        "functorch": _FUNCTORCH.value.save_config_portable(ignore_private_configs=False),
        "tag": torch.compiler.config.cache_key_tag,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "reduced": [getattr(torch.backends.cuda.matmul, name) for name in _REDUCED],
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICES],
    }


def apply_settings(settings: dict[str, Any]) -> None:
    """Put the settings of another process in force in this one."""
    for config, values in ((_INDUCTOR.value, settings["inductor"]), (_FUNCTORCH.value, settings["functorch"])):
        for name, value in values.items():
            if getattr(config, name) != value:
                setattr(config, name, value)
    torch.compiler.config.cache_key_tag = settings["tag"]
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    if float32_matmul_precision() != settings["precision"]:  # to set it to what it is changes a key of Inductor's
        torch.set_float32_matmul_precision(settings["precision"])
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    torch.utils.deterministic.fill_uninitialized_memory = settings["fill"]  # type: ignore[attr-defined]
    for name, value in zip(_REDUCED, settings["reduced"], strict=True):
        if getattr(torch.backends.cuda.matmul, name) != value:
            setattr(torch.backends.cuda.matmul, name, value)
    for kind, (enabled, dtype) in zip(_DEVICES, settings["autocast"], strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
