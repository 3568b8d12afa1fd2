"""Checkpoints: a safetensors file with the weights, and the sizes of the model in its metadata."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.testbed.model import Config, MoEDiT


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, or of another model; the message says which file and what to do."""


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None, **metadata: object) -> None:
    """Write ``module``'s parameters and persistent buffers to ``path``, with metadata values as JSON.

    With a ``dtype`` they are rounded to it; a model that loads them has them in its own dtype again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in module.state_dict().items()}
    partial = path.with_suffix(".partial")  # so that nobody reads half a file
    save_file(weights, partial, metadata={name: json.dumps(value) for name, value in metadata.items()})
    partial.replace(path)


def save_model(model: MoEDiT, path: Path, dtype: torch.dtype | None = None, **metadata: object) -> None:
    save_weights(model, path, dtype, config=asdict(model.cfg), **metadata)


def read_weights(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and metadata of ``path``. Raises CheckpointError, which ends with ``remedy``, if it cannot be read."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
    return weights, metadata


def load_into(module: nn.Module, weights: dict[str, Tensor], path: Path, remedy: str) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds another model's weights ({error}); {remedy}") from error


def load_model(path: Path, config: type[Config], remedy: str) -> MoEDiT:
    """A trained model in evaluation mode, whose sizes are a ``config``. Raises CheckpointError."""
    weights, metadata = read_weights(path, remedy)
    try:
        sizes = config(**metadata["config"])  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has no configuration of this model ({error!r}); {remedy}") from error
    model = MoEDiT(sizes)
    load_into(model, weights, path, remedy)
    return model.eval().requires_grad_(False)
