"""No cache at all: the model captured, its MoE layers lowered, and nothing else. The honest base line."""

from __future__ import annotations

from moeca_compile.policies.policy import ALWAYS, Policy

POLICY = Policy(
    reuses="nothing: the model as one graph, the base line",
    recipes={"none": {}},
    options=ALWAYS,
    declare=lambda options, regions: (),
)
