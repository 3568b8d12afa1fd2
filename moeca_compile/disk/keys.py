"""Keys of what is kept on disk: hashes of all that it depends on. Whatever changes gives another key.

What a key cannot say, it does not say wrongly: then there is none, and nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

import moeca_compile
from moeca_compile._torch_private import inductor_identity, is_fake, numeric_modes
from moeca_compile.config import MoecaConfig
from moeca_compile.disk.form import Form, NoFormError, computation, described, dynamo_form, graph_form, record_form
from moeca_compile.passes.match.regions import Regions

_SMALL = 1 << 24
"""Bytes of a tensor of integers up to which its values count. Larger ones are packed weights."""

_ELSEWHERE = (
    "dump",
    "disk_cache",
    "background",
    "progress",
    "trace",
    "tuned",
    "schedule",
    "schedule_exponent",
    "full_steps",
    "max_error",
)
"""Options that say what people see, or when steps are full, and change nothing within a step."""


def digest(*parts: Form) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def source_digest(folder: str = "") -> str:
    """A hash of this package's sources, or of a folder of them."""
    root, found = Path(moeca_compile.__file__).parent, hashlib.sha256()
    for path in sorted((root / folder).rglob("*")):
        if path.suffix in (".py", ".cpp"):
            found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def environment(device: torch.device) -> Form:
    """Sources, versions, machine and global modes. Raises NoFormError where a user's function takes part."""
    inductor = inductor_identity()
    if inductor is None:
        raise NoFormError("functions of the user's take part in Inductor's compilation")
    return [source_digest(), torch.__version__, torch.version.git_version, _machine(device.type), modes(), inductor]


def modes() -> list[str]:
    """The global modes that code and its results depend on."""
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return [str(mode) for mode in (*numeric_modes(), *deterministic)]


@cache
def _machine(device: str) -> Form:
    found: list[Any] = [platform.machine(), platform.python_version(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found.append(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        pass
    if device == "cuda":
        found += [torch.version.cuda, torch.version.hip, torch.cuda.get_device_name(), _triton_version()]
    return found


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def captured_key(gm: fx.GraphModule, inputs: Sequence[Any], device: torch.device) -> str:
    """A key of Dynamo's graph and of all that its export depends on. Raises NoFormError."""
    first: dict[int, int] = {}  # inputs that are given twice, or that share memory, are traced as such
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    memory = [StorageWeakRef(value.untyped_storage()).cdata for value in tensors]
    same = [[first.setdefault(each, i) for i, each in enumerate(many)] for many in (map(id, tensors), memory)]
    grad = [value.requires_grad for value in tensors]
    return digest(environment(device), dynamo_form(gm), inputs_form(inputs), same, grad)


def graph_key(module: fx.GraphModule, regions: Regions, config: MoecaConfig, device: torch.device) -> str:
    """A key of all that the steps of a graph are made from, but for how their inputs lie. Raises NoFormError."""
    return digest(environment(device), *graph_facts(module, regions, config, device))


def graph_facts(module: fx.GraphModule, regions: Regions, config: MoecaConfig, device: torch.device) -> list[Form]:
    """The same without the environment, as plain values. Raises NoFormError."""
    number = {node: i for i, node in enumerate(module.graph.nodes)}
    options = {name: str(value) for name, value in asdict(config).items() if name not in _ELSEWHERE}
    return [computation(graph_form(module)), record_form(regions, number), options, str(device)]


class RewriteFacts(NamedTuple):
    """What a verdict on the rewrite of a graph depends on, beside its inputs' shapes and the environment.

    Attributes:
        graph: graph_facts; weights: weight_facts.
    """

    graph: list[Form]
    weights: Form


def rewrite_facts(
    module: fx.GraphModule,
    regions: Regions,
    config: MoecaConfig,
    inputs: Sequence[Any],
    arguments: Sequence[bool],
    device: torch.device,
) -> RewriteFacts | None:
    """The facts of a normalized graph with what was matched in it; None where nothing is validated, or some has no
    form. On an accelerator the host waits for the device once.
    """
    if not (config.validate and config.policy.caches and regions.parts):
        return None
    try:
        return RewriteFacts(graph_facts(module, regions, config, device), weight_facts(inputs, arguments))
    except NoFormError:
        return None


def inputs_form(inputs: Sequence[Any]) -> Form:
    """Shapes, strides, dtypes and devices of tensors; other inputs are constants, and count as they are."""
    return [described(value) for value in inputs]


def weight_facts(inputs: Sequence[Any], arguments: Sequence[bool]) -> Form:
    """What a verdict on a graph depends on, of its weights.

    Not what they are: a rewrite that is right for some weights is right for others. But biases of zero, gates of zero
    and the like hide faults, and so could a table of integers that happens to be in order. So it says which weights
    are the same everywhere, and with what value, and the values of integers.
    """
    weights = [v for v, user in zip(inputs, arguments, strict=True) if not user and isinstance(v, Tensor)]
    if any(is_fake(weight) for weight in weights):
        raise NoFormError("fake weights have no values")
    suspects = [_first_row_is_constant(weight) for weight in weights]
    return [_facts(weight, bool(suspect)) for weight, suspect in zip(weights, _listed(suspects), strict=True)]


def _first_row_is_constant(weight: Tensor) -> Tensor:
    """A cheap question first: most weights differ within their first elements."""
    few = weight.detach().flatten()[:64] if weight.is_contiguous() else weight.detach().reshape(-1)[:64]
    return (few == few[:1]).all()


def _listed(values: Sequence[Tensor]) -> list[bool]:
    """The values of tensors of one element; the host waits for a device once."""
    found: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(value.device, []).append(i)
    listed = [False] * len(values)
    for places in found.values():
        for i, value in zip(places, torch.stack([values[i] for i in places]).tolist(), strict=True):
            listed[i] = value
    return listed


def _facts(weight: Tensor, suspect: bool) -> Form:
    if not weight.numel():
        return None
    weight = weight.detach()
    if not (weight.is_floating_point() or weight.is_complex()) and weight.nbytes <= _SMALL:
        values = weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(values.tobytes()).hexdigest()
    first = weight[(0,) * weight.ndim]
    return str(first.item()) if suspect and bool((weight == first).all()) else None
