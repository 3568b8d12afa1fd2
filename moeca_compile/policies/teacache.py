"""TeaCache: the change over the block stack is reused while the input of the first block has changed little.

The change of m, the first block's input after norm and modulation, from step to step,

    d = mean|m_t - m_prev| / (mean|m_prev| + 1e-6),

adds up, through a polynomial that may be fitted to the model. While the sum is below the threshold, the cached change
of the whole stack is reused. Embedding and final layer always run.

Source: TeaCache (Liu et al., CVPR 2025), section 3.3, as in MoECa's comparison (threshold 0.40, no polynomial).
"""

from __future__ import annotations

from functools import reduce

from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.match.residuals import branch_input
from moeca_compile.passes.rewrite.probe import Probe, relative_change, stored_before
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import stack
from moeca_compile.policies.criterion import Criterion, Decides, Memory, Signal, StepAt
from moeca_compile.policies.policy import DECIDING, FORECASTING, Policy

_BEFORE = "input_before"


def probe(options: Options, regions: Regions) -> Probe:
    """The change of the first block's input since the step before, and that input for the next step."""
    start, _ = regions.main_stack
    node = branch_input(next(residual for residual in regions.residuals if residual.stream is start))

    def signal(step: Step) -> Tensor:
        before = step.state[_BEFORE]
        step.updates[_BEFORE] = step[node].clone()  # which may be the user's own tensor
        return relative_change(step[node], before)

    return Probe(signal, (stored_before(_BEFORE, node),), reads=(node,))


class Accumulated(Criterion):
    """The changes since the last full step, rescaled and added up, have reached the threshold."""

    def __init__(self, options: Options, memory: Memory) -> None:
        super().__init__(options, memory)
        self.total = 0.0

    def exceeds(self, at: StepAt, signal: Signal) -> bool:
        self.total += rescaled(signal(), self.options.rescale)
        return not self.total < self.options.reuse_threshold  # so that NaN is full

    def restart(self) -> None:
        self.total = 0.0


def rescaled(change: float, coefficients: tuple[float, ...]) -> float:
    """The polynomial of these coefficients, that of the highest power first."""
    return reduce(lambda value, coefficient: value * change + coefficient, coefficients, 0.0)


POLICY = Policy(
    reuses="the change over the whole block stack, while the first block's input has changed little (TeaCache)",
    recipes={"teacache": {"reuse_threshold": 0.4}},
    options=DECIDING | FORECASTING | {"rescale", "warmup_steps"},
    declare=stack.declare,
    forecasts=("stack",),
    needs="a residual stream that runs through all blocks",
    decides=Decides(Accumulated, probe),
)
