"""LoRA adapters of experts, and those that change while a picture is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import moeca_compile
from tests.harness import own_warnings
from tests.pipelines.adapters import Pair, adapter
from tests.pipelines.tiny import TEXT, draw, flux, flux_inputs, hidream, steps_of

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
TEXTS = {**flux_inputs(), "side": 16}
PROMPT = {"prompt": "a cat on the moon", "negative_prompt": "a dog", "max_sequence_length": TEXT, "side": None}


def test_caches_are_not_used_beyond_a_change_of_adapters_in_the_middle_of_a_picture(enabled):
    pipe = flux()
    pipe.load_lora_weights(adapter(pipe.transformer, ("to_q", "to_out.0"), 1), "one")
    model = enabled(pipe, "stack", full_every=6)

    def full_steps(change: Callable[[], Any]) -> int:
        def after(_: Any, step: int, *__: Any) -> dict[str, Any]:
            if step == 2:
                change()
            return {}

        before = steps_of(model)
        draw(pipe, 6, callback_on_step_end=after, **TEXTS)
        full, cached = (now - then for now, then in zip(steps_of(model), before, strict=True))
        assert full + cached == 6
        return full

    changes = {
        "another weight": lambda: pipe.set_adapters(["one"], [0.5]),
        "and another, with no graph of its own": lambda: pipe.set_adapters(["one"], [0.25]),
        "off": pipe.disable_lora,
        "on": pipe.enable_lora,
        "fused": pipe.fuse_lora,
    }
    assert full_steps(lambda: None) == 1
    assert {name: full_steps(change) for name, change in changes.items()} == dict.fromkeys(changes, 2)


def test_adapters_of_experts_are_captured(enabled):
    """A pipeline puts adapters into training mode, in a model that is in eval mode."""
    pair = Pair(hidream, **PROMPT)
    model = enabled(pair.pipe, "moeca", full_every=1)
    pair.load("one", ("w1", "w2", "to_q"), 1)
    pair.compare()
    pair.do(lambda pipe: pipe.set_adapters(["one"], [0.5]))
    pair.compare()
    report = moeca_compile.report(model)
    assert [region.status for region in report.regions if region.kind == "experts"] == ["cached"] * 2
    assert report.graph_breaks == () and own_warnings(report) == []


@pytest.mark.slow
def test_the_adapter_of_a_single_expert_is_not_taken_for_those_of_the_others(enabled):
    pair = Pair(hidream, **PROMPT)
    enabled(pair.pipe, "moeca", full_every=1)
    pair.load("one", ("w1",), 1)
    pair.compare()

    def scale_one(pipe: Any) -> None:
        pipe.transformer.single_stream_blocks[0].block.ff_i.experts[1].w1.set_scale("one", 3.0)

    pair.do(scale_one)
    with pytest.warns(moeca_compile.capture.CaptureWarning, match="not the sum of its experts"):
        pair.compare()
