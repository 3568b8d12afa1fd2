import json
from dataclasses import replace

import pytest
import torch

from examples.digits.testbed import DIGITS, DigitsConfig
from examples.testbed.classifier import Classifier
from examples.testbed.compare import (
    BASELINE,
    UNCACHED,
    UNCACHED_WARMUP,
    Policy,
    Setting,
    as_json,
    environment,
    make_rows,
    paired_speedup,
    private_copy,
    run_paired,
    step_reductions,
    warmup_steps,
)
from examples.testbed.model import MoEDiT
from examples.testbed.picture import mosaic, save_picture

SETTING = Setting(DIGITS.image_shape, batch=4, steps=4, repeats=2)
CPU = torch.device("cpu")


def decay(x, t, y):
    return x


def faster_decay(x, t, y):
    return 1.1 * x


def ignore(_name):
    pass


@pytest.fixture
def policies():
    made = [
        Policy(BASELINE, decay, 4, "euler"),
        Policy(UNCACHED, decay, 4, "euler"),
        Policy("moeca", faster_decay, 4, "euler", flops_speedup=2.0),
    ]
    run_paired(made, SETTING, CPU, ignore)
    return made


def test_every_policy_gets_the_same_seeds_and_each_repeat_another(policies):
    baseline, uncached, cached = policies
    assert [len(policy.seconds) for policy in policies] == [2, 2, 2]
    assert torch.equal(torch.cat(baseline.images), torch.cat(uncached.images))
    assert not torch.equal(baseline.images[0], baseline.images[1])
    assert not torch.equal(baseline.images[0], cached.images[0])


def test_only_what_never_caches_is_warmed_up_in_few_steps():
    steps = {name: warmup_steps(Policy(name, decay, 50, "euler")) for name in (BASELINE, UNCACHED, "moeca")}
    assert steps == {BASELINE: UNCACHED_WARMUP, UNCACHED: UNCACHED_WARMUP, "moeca": 50}
    assert warmup_steps(Policy(BASELINE, decay, 3, "euler")) == 3


def test_policies_take_turns():
    order = []
    made = [Policy(name, decay, 2, "euler") for name in ("a", "b")]
    run_paired(made, replace(SETTING, steps=2), CPU, order.append)
    assert order == ["a", "a", "b", "b"] * 2


def test_speedup_is_the_median_of_paired_ratios():
    slow, fast = Policy("slow", decay, 1, "euler"), Policy("fast", decay, 1, "euler")
    slow.seconds, fast.seconds = [4.0, 40.0, 6.0], [2.0, 10.0, 2.0]  # ratios 2, 4, 3
    assert paired_speedup(slow, fast) == 3.0


def test_rows_compare_with_the_base_line(policies):
    torch.manual_seed(0)
    rows = make_rows(policies, SETTING, Classifier().eval(), torch.randn(20, 1, 8, 8))
    baseline, uncached, cached = rows
    assert baseline.speedup_over_compile == uncached.speedup_over_uncached == 1.0
    assert uncached.psnr > cached.psnr
    assert uncached.frechet == pytest.approx(baseline.frechet)
    assert cached.flops_speedup == 2.0
    kept = json.loads(json.dumps(as_json(rows, SETTING, environment(CPU, torch.float32))))
    assert kept["rows"][2]["policy"] == "moeca"
    assert kept["setting"]["steps"] == 4
    assert kept["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(("sampler", "names"), [("euler", 2), ("multistep", 1), ("ddpm", 1)])
def test_step_reductions_spend_the_targets_flops(sampler, names):
    setting = replace(SETTING, steps=50, sampler=sampler)
    target = Policy("moeca", decay, 50, sampler, flops_speedup=3.1)
    reduced = list(step_reductions(Policy(BASELINE, decay, 50, sampler), target, setting))
    assert len(reduced) == names
    assert all(policy.steps == 16 and policy.flops_speedup == 50 / 16 for policy in reduced)
    assert [policy.sampler for policy in reduced] == [sampler, "multistep"][:names]


def test_private_copies_are_equal_and_share_no_forward():
    torch.manual_seed(0)
    model = MoEDiT(DigitsConfig(width=32, depth=2, heads=2, expert_width=16)).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    first, second = private_copy(model), private_copy(model)
    assert first.forward.__code__ is not second.forward.__code__
    assert isinstance(first, MoEDiT)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    assert torch.equal(first(x, t, y), model(x, t, y))
    first.pos_embed.data.zero_()
    assert second.pos_embed.abs().sum() > 0


def test_a_graph_break_in_one_private_copy_leaves_the_others_whole():
    """With plain copies there would be a graph for each block."""
    torch._dynamo.reset()
    model = MoEDiT(DigitsConfig(width=32, depth=4, heads=2, expert_width=16)).eval()
    model.blocks[1].mlp = model.blocks[3].mlp = torch.nn.Identity()
    arguments = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    broken = private_copy(model)
    broken.blocks[1].mlp.forward = lambda x: (torch._dynamo.graph_break(), x)[1]
    with torch.no_grad():
        torch.compile(broken, backend="eager")(*arguments)
        torch.compile(private_copy(model), backend=count)(*arguments)
    assert len(graphs) == 1


def test_mosaic_places_digits_in_reading_order():
    images = torch.arange(7.0)[:, None, None, None].expand(7, 1, 8, 8)
    picture = mosaic(images, empty=-1.0)
    assert picture.shape == (2 * 9 - 1, 5 * 9 - 1)
    assert picture[0, ::9].tolist() == [0, 1, 2, 3, 4]
    assert picture[9, ::9].tolist() == [5, 6, -1, -1, -1]
    assert (picture[8] == -1).all()


def test_mosaic_keeps_colors_and_takes_columns():
    images = torch.rand(6, 3, 4, 4)
    picture = mosaic(images, empty=0.0, columns=3)
    assert picture.shape == (2 * 5 - 1, 3 * 5 - 1, 3)
    assert torch.equal(picture[5:9, 10:14], images[5].permute(1, 2, 0))


def test_picture_is_written(policies, tmp_path):
    rows = make_rows(policies, SETTING, Classifier().eval(), torch.randn(20, 1, 8, 8))
    save_picture(tmp_path / "picture.png", policies[0], policies[2:], rows)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
