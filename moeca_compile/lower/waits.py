"""Which MoE layers' ops have to ask the host at every step, on a device that then waits."""

from __future__ import annotations

import torch

from moeca_compile.notes import Notes
from moeca_compile.ops import triton as kernels
from moeca_compile.passes.analysis.graph import module_path
from moeca_compile.passes.match.regions import Regions


def why_experts_wait(regions: Regions, device: torch.device, notes: Notes) -> str | None:
    """Warn of each layer whose experts wait for the host on `device`; returns one reason, None for none."""
    found = None
    for marker, body in regions.bodies.items():
        rows, parameters = ([node.meta["val"] for node in nodes] for nodes in (body.rows, body.parameters))
        reason = kernels.why_not(device, body.key, rows, parameters, body.experts)
        if reason is not None:
            found = f"the experts of {module_path(marker)} wait for the device at every step: {reason}"
            notes.warn(found)
    return found
