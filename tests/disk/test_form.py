"""Graphs as plain values: what comes back is what was written, and nothing else than graphs of known ops does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import fx

from moeca_compile._torch_private import trace_to_graph
from moeca_compile.disk.form import (
    NoFormError,
    computation,
    dynamo_form,
    form_of,
    graph_form,
    graph_of,
    value_of,
)
from moeca_compile.lower.program import trace_step
from moeca_compile.passes.rewrite.kinds import StepKind
from tests.harness import Captured, caches_of, exported

VALUES = [
    None,
    True,
    -3,
    0.1,
    float("inf"),
    "text",
    [1, [2, 3]],
    (1, (2, None)),
    torch.float8_e4m3fn,
    torch.device("cuda:1"),
    torch.strided,
    torch.channels_last,
    slice(1, None, 2),
    ...,
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_value_comes_back_by_way_of_text(value):
    found = value_of(json.loads(json.dumps(form_of(value))), [])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", [object(), {"a": 1}, lambda: 0, torch.ones(1), 1j])
def test_what_text_cannot_say_has_no_form(value):
    with pytest.raises(NoFormError):
        form_of(value)


@pytest.mark.parametrize(
    "form", [{"dtype": "save"}, {"node": 3}, {"other": 1}, {"device": "x"}, {}, {"a": 1, "b": 2}]
)
def test_what_is_no_form_has_no_value(form):
    with pytest.raises(NoFormError):
        value_of(form, [])


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    return graph_of(json.loads(json.dumps(graph_form(gm))))


@pytest.mark.parametrize("kind", [StepKind(), StepKind(False, False, 8)], ids=lambda kind: kind.name)
def test_a_traced_step_comes_back_as_it_was(small_graph: Captured, kind: StepKind):
    loop = small_graph.loop(recipe="moeca", validate=False)
    step = trace_step(loop.compiled.function(kind), small_graph.inputs, *caches_of(loop)).graph
    again = copy(step)
    assert again.code == step.code
    assert graph_form(again) == graph_form(step)
    assert [node.name for node in again.graph.nodes] == [node.name for node in step.graph.nodes]


def test_constants_come_back_with_their_values():
    x = torch.randn(3)
    step = trace_to_graph(lambda x: [x + torch.tensor([1.0, 2.0, 3.0])], x)
    torch.testing.assert_close(copy(step)(x)[0], step(x)[0])


def test_names_are_no_part_of_what_a_graph_computes():
    one, other = (trace_to_graph(lambda x: [x.sin() + 1], torch.ones(2)) for _ in range(2))
    list(other.graph.nodes)[1].name = "another"
    assert graph_form(one) != graph_form(other)
    assert computation(graph_form(one)) == computation(graph_form(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: [x.sin()], lambda x: [x.cos()]),
        (lambda x: [x + 1], lambda x: [x + 2]),
        (lambda x: [x + torch.tensor([1.0])], lambda x: [x + torch.tensor([2.0])]),
        (lambda x: [x.sum(0)], lambda x: [x.sum(1)]),
        (lambda x: [x, x.sin()], lambda x: [x.sin(), x]),
    ],
)
def test_other_computations_have_other_forms(one, other):
    forms = [computation(graph_form(trace_to_graph(each, torch.ones(2, 2)))) for each in (one, other)]
    assert forms[0] != forms[1]


def test_other_shapes_strides_and_dtypes_have_other_forms():
    inputs = [torch.ones(2, 3), torch.ones(3, 2), torch.ones(3, 2).t(), torch.ones(2, 3, dtype=torch.float64)]
    forms = [str(computation(graph_form(trace_to_graph(lambda x: [x.sin()], x)))) for x in inputs]
    assert len(set(forms)) == len(inputs)


torch.library.define("users_for_this_test::op", "(Tensor x) -> Tensor")


@torch.library.impl("users_for_this_test::op", "CompositeExplicitAutograd")
def _op(x):
    return x.clone()


@torch.library.register_fake("users_for_this_test::op")
def _(x):
    return torch.empty_like(x)


def test_an_op_of_the_users_has_no_form_since_it_may_change_unseen():
    gm = trace_to_graph(lambda x: [torch.ops.users_for_this_test.op(x)], torch.ones(2))
    with pytest.raises(NoFormError, match="no op of"):
        graph_form(gm)
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.users_for_this_test.op, (graph.placeholder("x"),)))
    with pytest.raises(NoFormError, match="unseen"):
        dynamo_form(fx.GraphModule({}, graph))


def test_dynamos_graph_has_a_form_that_functions_of_torch_and_python_have_part_in(small_graph: Captured):
    form = dynamo_form(small_graph.gm)
    assert json.loads(json.dumps(form)) is not None
    assert any("moeca.experts_fixed_k" in str(line[1]) for line in form)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1].__setitem__(2, "os.system"),
        lambda lines: lines[1].__setitem__(2, "aten.__class__.default"),
        lambda lines: lines[1].__setitem__(2, "aten.sin"),
        lambda lines: lines[1].__setitem__(0, "call_module"),
        lambda lines: lines[1].__setitem__(3, [{"tuple": [{"node": 7}]}, {}]),
        lambda lines: lines[1].__setitem__(5, 99),
        lambda lines: lines.pop(0),
        lambda lines: lines.append(None),
    ],
)
def test_what_is_no_graph_gives_none(change: Any):
    form = graph_form(exported(lambda x: x.sin(), torch.ones(2)))
    change(form[0])
    with pytest.raises(NoFormError):
        graph_of(form)
