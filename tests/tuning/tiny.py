"""A small model with a sampling loop, and files that a tune would have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moeca_compile
from moeca_compile import tuned_file
from tests.models import SMALL, make_model

EAGER = {"lowering": "eager", "validate": False, "disk_cache": False}


def small() -> nn.Module:
    return make_model(SMALL)


def loop(steps: int) -> Callable[[Any, int], Tensor]:
    """Euler steps from t = 1 to 0, a batch of two."""

    def sample(model: Any, seed: int) -> Tensor:
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        labels = torch.tensor([1, 2])
        for i in range(steps):
            x = x - model(x, torch.full((2,), 1 - i / steps), labels) / steps
        return x

    return sample


def written(path: Path, model: nn.Module, **changes: Any) -> Path:
    """A file for this model, of 8 steps, with two calibrated schedules."""
    values = {
        "moeca_tuned": 1,
        "options": {
            "recipe": "stack-forecast",
            "schedule": {"steps": 8, "full_steps": [0, 3, 6, 7]},
            "corrector": True,
            "cache_dtype": "bfloat16",
            **EAGER,
        },
        "steps": 8,
        "model": tuned_file.fingerprint(model)._asdict(),
        "versions": {"torch": str(torch.__version__), "moeca_compile": moeca_compile.__version__},
        "schedules": {"2": [0, 5], "4": [0, 3, 6, 7]},
        **changes,
    }
    path.write_text(json.dumps(values))
    return path
