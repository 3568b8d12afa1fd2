"""No cache: the model is captured and its MoE layers are lowered. The baseline for every other recipe."""

from __future__ import annotations

from moeca_compile.policies.policy import ALWAYS, Policy

POLICY = Policy(
    reuses="nothing: the model as one graph, the baseline",
    recipes={"none": {}},
    options=ALWAYS,
    declare=lambda options, regions: (),
    caches=False,
)
