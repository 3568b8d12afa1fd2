"""Find MoE layers whose ops read values on the host, so that it waits for the device at every step."""

from __future__ import annotations

import torch

from moeca_compile.notes import Notes
from moeca_compile.ops import triton as kernels
from moeca_compile.passes.analysis.graph import module_path
from moeca_compile.passes.match.regions import Regions


def why_experts_wait(regions: Regions, device: torch.device, notes: Notes) -> str | None:
    """Warn of each layer whose experts make the host wait for `device`; returns one reason, or None."""
    found = None
    for marker, body in regions.bodies.items():
        rows, parameters = ([node.meta["val"] for node in nodes] for nodes in (body.rows, body.parameters))
        reason = kernels.why_not(device, body.key, rows, parameters, body.experts)
        if reason is not None:
            experts = f"the experts of {module_path(marker)}"
            found = f"{experts} wait for the device at every step: {reason}"
            notes.warn(
                f"no kernels can run {experts} ({reason}). They wait for the device at every step, which is slower. "
                "docs/limits.md says which experts the kernels can run"
            )
    return found
