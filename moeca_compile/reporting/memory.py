"""Bytes by what they hold: weights, and the caches of one stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import Role

_NOTES = {Role.ACTIVATION: "", Role.ROUTING: ", routing", Role.STATISTIC: ", statistics"}


def memory_by_kind(graphs: Sequence[CompiledGraph], weights: int) -> dict[str, int]:
    """Bytes of the weights, and of one stream's caches: by the kind of region and, for MoE layers, by their role.

    What a probe keeps is a kind of its own.
    """
    found = {"weights": weights} if graphs else {}
    for compiled in graphs:
        kinds = _kinds(compiled.regions)
        for replacement in compiled.plan.replacements:
            for spec in replacement.specs:
                name = kinds.get(replacement.node, "blocks") + _NOTES[spec.role]
                found[name] = found.get(name, 0) + spec.nbytes
        if compiled.plan.probe is not None:
            found["probe"] = found.get("probe", 0) + sum(spec.nbytes for spec in compiled.plan.probe.caches)
    return found


def _kinds(regions: Regions) -> dict[fx.Node, str]:
    found = {part.residual.output: "attention" for part in regions.attentions}
    found |= {part.output: "feedforward" for part in regions.feedforwards}
    for layer in regions.experts:
        found |= dict.fromkeys((layer.marker, layer.residual.output), "experts")
        found |= {shared.output: "shared experts" for shared in layer.shared}
    return found
