"""Capture's wrappers: when they step aside, and that they are the methods that they stand for in all else."""

from __future__ import annotations

import inspect
import pickle
import textwrap

import pytest
import torch
from torch import nn

from moeca_compile import capture
from moeca_compile.capture.install import wrap
from moeca_compile.capture.source import innermost
from tests.capture.layers import NumpyEnds, RunningStart, stack, tokens
from tests.harness import RecordingBackend, nodes_of

LAYER = torch.ops.moeca.experts_fixed_k


def markers(model, x, gradients=False) -> int:
    backend = RecordingBackend(run=lambda gm: gm.forward if not nodes_of(gm, LAYER) else lambda *a: (x,))
    with torch.set_grad_enabled(gradients):
        torch.compile(model, backend=backend)(x)
    return sum(len(nodes_of(gm, LAYER)) for gm in backend.graphs)


def test_gradients_keep_the_original():
    assert markers(stack(NumpyEnds()), tokens(), gradients=True) == 0
    assert markers(stack(NumpyEnds()), tokens()) == 1


def test_training_mode_keeps_the_original():
    assert markers(stack(NumpyEnds()).train(), tokens()) == 0
    assert capture.refusals() == ()


def test_gradients_flow_as_without_capture():
    class WithGradients(RunningStart):
        def dispatch(self, choice, weights, tokens):
            out = torch.zeros_like(tokens)
            order = choice.flatten().argsort()
            ends = choice.flatten().bincount().cumsum(0).tolist()
            for e, end in enumerate(ends):
                start = 0 if e == 0 else ends[e - 1]
                rows = order[start:end] // self.top_k
                y = self.experts[e](tokens[rows]) * weights.view(-1, 1)[order[start:end]]
                out = out.index_add(0, rows, y)
            return out

    model = stack(WithGradients())
    torch.compile(model, backend=RecordingBackend())(tokens()).square().sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(tokens()).square().sum().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_inference_mode_is_captured():
    model, x = stack(NumpyEnds()), tokens()
    backend = RecordingBackend(run=lambda gm: lambda *inputs: (x,))
    with torch.inference_mode():
        torch.compile(model, backend=backend)(x)
    assert len(backend.graphs) == 1 and len(nodes_of(backend.graphs[0], LAYER)) == 1


def test_a_class_defined_after_a_reset_is_captured():
    torch._dynamo.reset()

    class Late(NumpyEnds):
        @torch.no_grad()
        def moe_infer(self, rows, ids, gates):
            out = torch.zeros_like(rows)
            order = ids.argsort()
            ends = ids.bincount().cpu().numpy().cumsum(0)
            for e, end in enumerate(ends):
                start = 0 if e == 0 else ends[e - 1]
                picked = order[start:end] // self.top_k
                out.index_add_(0, picked, self.experts[e](rows[picked]) * gates[order[start:end]])
            return out

    assert markers(stack(Late()), tokens()) == 1


def test_installing_again_wraps_nothing_twice():
    wrapped = NumpyEnds.moe_infer
    capture.install()
    wrap()
    assert NumpyEnds.moe_infer is wrapped


def test_a_class_that_cannot_be_read_stays_as_it_is_and_others_are_wrapped():
    """A subscript of a name that is no local; a method that hides its code; a class that refuses new attributes."""

    class Unlocal(nn.Module):
        def forward(self, rows, **options):
            for expert in self.experts:
                hit = torch.where(rows > 0)[0]
                options["rows"] = expert(rows[hit])
                GLOBAL[hit] = 0
            return rows

    class Refusing(type(nn.Module)):
        def __setattr__(cls, name, value):
            raise TypeError("this class is sealed")

    class Sealed(NumpyEnds, metaclass=Refusing):
        moe_infer = NumpyEnds.moe_infer.__wrapped__

    class Unhashable(type(nn.Module)):
        def __eq__(cls, other):
            return cls is other

        __hash__ = None

    class Riddle(nn.Module, metaclass=Unhashable):
        pass

    class Secretive(type(nn.Module)):
        @property
        def __dict__(cls):
            raise AttributeError("nothing to see")

        @property
        def __module__(cls):
            raise AttributeError("from nowhere")

        def __subclasses__(cls):
            raise TypeError("childless")

    class Hidden(nn.Module, metaclass=Secretive):
        pass

    unwrapped = vars(Sealed)["moe_infer"]
    wrap()
    assert vars(Sealed)["moe_infer"] is unwrapped

    class After(NumpyEnds):
        moe_infer = NumpyEnds.moe_infer.__wrapped__

    wrap()
    assert hasattr(After.moe_infer, "__wrapped__")
    assert torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(2)).shape == (2,)
    assert all(issubclass(each, nn.Module) for each in (Riddle, Hidden))


GLOBAL = torch.zeros(4)


def test_uninstall_gives_the_methods_back():
    wrapped = NumpyEnds.moe_infer
    try:
        capture.uninstall()
        assert NumpyEnds.moe_infer is wrapped.__wrapped__
        assert markers(stack(NumpyEnds()), tokens()) == 0
    finally:
        capture.install()
        wrap()
    assert NumpyEnds.moe_infer.__wrapped__ is wrapped.__wrapped__


def test_a_wrapper_is_named_signed_and_pickled_like_its_method():
    method = NumpyEnds.moe_infer
    assert list(inspect.signature(method).parameters) == [
        "self",
        "x",
        "flat_expert_indices",
        "flat_expert_weights",
    ]
    assert (method.__name__, method.__qualname__) == ("moe_infer", "NumpyEnds.moe_infer")
    assert "expert_cache" in textwrap.dedent(inspect.getsource(method))
    assert innermost(method).__code__.co_name == "moe_infer"


def test_a_bound_wrapper_survives_pickling():
    layer, x = NumpyEnds().eval(), tokens()[0]
    index, weight = torch.zeros(20, dtype=torch.long), torch.ones(20, 1)
    index[1::2] = 1
    copied = pickle.loads(pickle.dumps(layer.moe_infer))
    torch.testing.assert_close(copied(x, index, weight), layer.moe_infer(x, index, weight))


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"options": {"full_every": 4}}])
def test_the_gate_looks_through_torchs_wrappers(options):
    seen = []

    def backend(gm, inputs, **kwargs):
        seen.append(len(nodes_of(gm, LAYER)))
        return lambda *inputs: (tokens(),)

    backend._moeca_backend = True
    with torch.no_grad():
        torch.compile(stack(NumpyEnds()), backend=backend, **options)(tokens())
    assert seen == [1]
