"""`moeca explain`: what it prints of models, and what it says of what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moeca_compile
from moeca_compile.command import explain as command
from moeca_compile.command.main import main
from tests.command import factories

pytestmark = pytest.mark.usefixtures("traced_once")
AT = "tests.command.factories:"


def explained(capsys: pytest.CaptureFixture[str], factory: str, *options: str) -> str:
    assert main(["explain", AT + factory, *options]) == 0
    return capsys.readouterr().out


def test_each_recipe_has_a_row_that_says_what_it_caches_and_what_that_costs(capsys):
    text = explained(capsys, "model", "--inputs", f"{AT}inputs")
    assert text.startswith(
        "TinyDiTMoE, 137,924 parameters, cpu, torch.float32\n1 graph, no graph breaks\ntimestep: t\n"
    )
    found = "2 routers, 2 MoE layers, 4 attentions, 4 feed-forwards"
    rows = {line.split()[0]: line for line in text.splitlines() if "MFLOP" in line}
    recipes = [
        "auto",
        "moeca",
        "moeca-forecast",
        "fora",
        "fora-forecast",
        "taylorseer",
        "stack",
        "stack-forecast",
        "block",
        "block-forecast",
        "deepcache",
        "delta",
        "toca",
        "duca",
        "teacache",
        "block-cache",
        "magcache",
    ]
    assert list(rows) == recipes
    assert re.fullmatch(rf"moeca +{found} +\S+ KiB +\S+ MFLOP +\S+ kFLOP to \S+ MFLOP", rows["moeca"])
    assert re.fullmatch(rf"stack +{found} +4 KiB +\S+ MFLOP +\S+ kFLOP", rows["stack"])
    line = factories.make_model().blocks[0].attn.forward.__code__.co_firstlineno
    first = f"attention blocks.0.attn (dit.py:{line}): the recipe runs it at every step"
    assert f"{first} [block, block-forecast, deepcache, block-cache]" in text
    assert "(linear.py" not in text, "torch's own code tells nothing"
    assert "warning" not in text


def test_bytes_and_flops_are_those_that_the_report_has_after_compilation():
    subject = command.subject_named(f"{AT}with_inputs", None, "cpu")
    (choice,) = command.explain(subject, ["fora"]).choices
    options = {"recipe": "fora", "validate": False, "lowering": "eager", "full_every": 2}
    compiled = torch.compile(subject.model, backend="moeca", options=options)
    noise, t, labels = subject.arguments
    with torch.no_grad():
        for step in range(4):
            compiled(noise * (1 - 0.1 * step), t * (1 - 0.1 * step), labels)
    report = moeca_compile.report(compiled)
    assert report.steps == {"full": 2, "cache": 2}
    assert choice.cache_bytes == report.planned_cache_bytes
    assert choice.full_step == pytest.approx(report.flops.full_step, rel=0.05)
    assert (choice.full_step + choice.least) / 2 == pytest.approx(report.flops.mean_step, rel=0.05)


def test_arguments_by_name_and_chosen_recipes(capsys):
    text = explained(capsys, "model", "--inputs", f"{AT}by_name", "--recipe", "stack", "--recipe", "none")
    assert [line.split()[0] for line in text.splitlines()[5:]] == ["stack", "none"]
    assert re.search(r"^none +nothing +- +\S+ MFLOP +-$", text, re.MULTILINE)


def test_a_graph_break_is_named_with_its_line(capsys):
    text = explained(capsys, "breaking", "--recipe", "moeca")
    assert "\n2 graphs, 1 graph break\n" in text
    source = Path(factories.__file__).read_text().splitlines()
    line = next(number for number, code in enumerate(source, 1) if ".item()" in code)
    assert f"{factories.__file__}:{line}: " in text and "warning: " in text
    assert "2 MoE layers" in text


def test_a_dense_model_may_be_on_the_meta_device_and_recipes_for_experts_find_nothing(capsys):
    text = explained(capsys, "dense", "--device", "meta", "--recipe", "stack", "--recipe", "moeca")
    assert text.startswith("DiT") or "meta" in text.splitlines()[0]
    assert re.search(r"^stack +\d+ attentions, \d+ feed-forwards", text, re.MULTILINE)
    assert re.search(r"^moeca +nothing +-", text, re.MULTILINE)
    assert "warning: recipe 'moeca' found nothing" in text


def test_what_has_nothing_to_cache_is_said(capsys):
    assert "nothing was recognized" in explained(capsys, "small", "--recipe", "fora")


WRONG = {
    "no module": (["nowhere.to:find"], "there is no module 'nowhere'. Run moeca in the folder"),
    "no name": (["my_model.py"], "'my_model.py' is no module:function. Write it as you would import it"),
    "no function": ([f"{AT}modle"], "tests.command.factories has no modle. It has "),
    "no callable": ([f"{AT}NUMBER"], "NUMBER is a int. Name a function that makes it"),
    "raises": ([f"{AT}raising"], "raising raised ValueError in factories.py:"),
    "no inputs": ([f"{AT}model"], "nothing to call it with. Give --inputs module:function"),
    "no model": ([f"{AT}too_few", "--inputs", f"{AT}inputs"], "too_few raised TypeError"),
    "inputs raise": (
        [f"{AT}model", "--inputs", f"{AT}raising_inputs"],
        "raising_inputs raised KeyError in factories.py:",
    ),
    "one tensor": ([f"{AT}model", "--inputs", f"{AT}one_tensor"], "returned a Tensor. Let it return a tuple"),
    "no fit": (
        [f"{AT}model", "--inputs", f"{AT}too_few"],
        "it raised TypeError: ",
    ),
    "no recipe": ([f"{AT}model", "--recipe", "stakc"], "no recipe 'stakc'. The recipes are none, auto, moeca"),
    "experts without values": ([f"{AT}experts", "--device", "meta"], "Leave out --device meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_explained(case, capsys):
    arguments, message = WRONG[case]
    assert main(["explain", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("moeca explain: ") and message in shown.err
    if case == "no fit":
        assert "forward(x" in shown.err and "(float32 (2, 1, 8, 8))" in shown.err
