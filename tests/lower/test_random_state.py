"""Models that draw random numbers: steps draw those of eager mode, and validation none of the user's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import moeca_compile
from tests.variants.blocks import Block, Blocking, Modelling, make_inputs, make_model, moving, timestep
from tests.variants.dispatch import Layering

HOW = Modelling((Blocking(feedforward=Layering()),))


class Noisy(Block):
    """Drops out its input in eval mode."""

    def forward(self, h, context):
        return super().forward(F.dropout(h, 0.1, training=True), context)


def test_steps_draw_what_eager_mode_draws():
    model = make_model(HOW)
    model.blocks[0].__class__ = Noisy
    compiled = torch.compile(
        model, backend="moeca", options={"recipe": "moeca", "full_every": 1, "lowering": "eager"}
    )
    noise, inputs = make_inputs(HOW)
    with torch.no_grad():
        for step in range(3):
            x, t = moving(noise, step), timestep(HOW, step, 3)
            torch.manual_seed(step)
            wanted, after = model(x, t, *inputs), torch.get_rng_state()
            torch.manual_seed(step)
            torch.testing.assert_close(compiled(x, t, *inputs), wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(torch.get_rng_state(), after)
    report = moeca_compile.report(compiled)
    assert report.steps == {"full": 3}
    assert max(report.validation_errors.values()) < 1e-4
