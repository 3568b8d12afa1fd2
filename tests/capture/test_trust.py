"""A recognized method is replaced only where numbers show that its equivalent means the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.dit import SwiGLU
from moeca_compile import capture
from moeca_compile.capture.structure import unlike
from tests.capture.layers import WIDTH, NumpyEnds, stack, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

LAYER = torch.ops.moeca.experts_fixed_k


class Dropping(nn.Module):
    """Random whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.dropout(self.up(x), 0.5, training=True)


class Centred(Dropping):
    """An output depends on the other rows."""

    def forward(self, x):
        return self.up(x - x.mean(0))


class Counting(Dropping):
    """Keeps state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.up(x)


class Scaled(Dropping):
    """A number of its own in every expert."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Scaled.made += 1
        self.scale = float(Scaled.made)

    def forward(self, x):
        return self.up(x) * self.scale


class HiddenlyScaled(Scaled):
    """The same where a look at the attributes does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.scale = {"scale": self.scale}, 1.0

    def forward(self, x):
        return self.up(x) * self.settings["scale"]


class UnregisteredTensor(Dropping):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.randn(WIDTH)

    def forward(self, x):
        return self.up(x) + self.shift


def widths_that_differ():
    hidden = iter(range(8, 40))
    return lambda: SwiGLU(WIDTH, next(hidden))


class SlotMajor(NumpyEnds):
    """Takes the flat ids for (k, T): the code of dispatch with another meaning than (T, k)."""

    def moe_infer(self, x, ids, weights):
        out = torch.zeros_like(x)
        order = ids.argsort()
        ends = ids.bincount().cpu().numpy().cumsum(0)
        token = order % len(x)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            rows = token[start:end]
            out.index_add_(0, rows, self.experts[e](x[rows]) * weights[order[start:end]])
        return out


class Halved(NumpyEnds):
    def moe_infer(self, x, ids, weights):
        out = torch.zeros_like(x)
        order = ids.argsort()
        ends = ids.bincount().cpu().numpy().cumsum(0)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            rows = order[start:end] // self.top_k
            out.index_add_(0, rows, 0.5 * self.experts[e](x[rows]) * weights[order[start:end]])
        return out


class Raising(NumpyEnds):
    def moe_infer(self, x, ids, weights):
        if len(x) != 20:
            raise ValueError("20 rows or nothing")
        out = torch.zeros_like(x)
        order = ids.argsort()
        ends = ids.bincount().cpu().numpy().cumsum(0)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            rows = order[start:end] // self.top_k
            out.index_add_(0, rows, self.experts[e](x[rows]) * weights[order[start:end]])
        return out


def zeroed(layer: nn.Module) -> nn.Module:
    """As before training: every expert's output is zero, and so is every difference."""
    with torch.no_grad():
        for expert in layer.experts:
            expert.down_proj.weight.zero_()
    return layer


def with_hooks(layer: nn.Module) -> nn.Module:
    layer.experts[3].register_forward_hook(lambda module, args, output: output * 2)
    return layer


REFUSED = [
    (lambda: NumpyEnds(expert=widths_that_differ()), "expert 1 is built differently"),
    (lambda: NumpyEnds(expert=Dropping), "random"),
    (lambda: NumpyEnds(expert=Centred), "depends on the other tokens"),
    (lambda: NumpyEnds(expert=Scaled), "expert 1 is built differently"),
    (lambda: NumpyEnds(expert=HiddenlyScaled), "not the sum of its experts' weighted outputs"),
    (lambda: NumpyEnds(expert=UnregisteredTensor), "neither a parameter nor a buffer"),
    (lambda: with_hooks(NumpyEnds()), "expert 3 has forward hooks"),
    (lambda: SlotMajor(), "not the sum of its experts' weighted outputs"),
]

FOUND_BY_RUNNING = [
    lambda: NumpyEnds(expert=Counting),
    lambda: Halved(),
    lambda: zeroed(Halved()),
    lambda: Raising(),
]
"""No idiom's equivalent is right for them; running them shows what is."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_what_is_not_trusted_runs_as_it_is_with_one_warning(make, reason):
    layer = make()
    model, backend = stack(layer, layer), RecordingBackend()
    with torch.no_grad(), pytest.warns(capture.CaptureWarning) as caught:
        torch.manual_seed(3)
        got = torch.compile(model, backend=backend)(tokens())
        torch.manual_seed(3)
        want = model(tokens())
    assert not any(nodes_of(gm, LAYER) for gm in backend.graphs)
    torch.testing.assert_close(got, want)
    (refusal,) = capture.refusals()
    (warning,) = [each for each in caught if each.category is capture.CaptureWarning]
    assert reason in refusal.reason
    assert refusal.method.endswith("moe_infer")
    assert refusal.where.rpartition(":")[0].endswith(".py") and int(refusal.where.rpartition(":")[2]) > 0
    assert all(part in str(warning.message) for part in refusal)


@pytest.mark.parametrize("make", FOUND_BY_RUNNING)
def test_what_is_not_trusted_may_be_found_by_running_it(make):
    layer = make()
    model = stack(layer, layer)
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(tokens()), model(tokens()))
    assert len(nodes_of(backend.graphs[0], LAYER)) == 2 and capture.refusals() == ()


def test_experts_in_training_mode_are_not_trusted():
    model = stack(NumpyEnds(expert=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))))
    model[0].moe.experts[2].train()
    backend = RecordingBackend()
    with torch.no_grad(), pytest.warns(capture.CaptureWarning, match="expert 2 is in training mode"):
        torch.compile(model, backend=backend)(tokens())
    assert not any(nodes_of(gm, LAYER) for gm in backend.graphs)


def test_a_batch_norm_in_training_mode_is_told_without_running_it():
    experts = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))
    assert unlike(experts) == "expert 0 is in training mode"
    assert unlike(experts.eval()) is None


def test_training_mode_is_none_of_the_matter_where_no_code_asks_for_it():
    def expert():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ModuleDict({"drop": nn.Dropout(0.1)}), nn.Identity())

    experts = nn.ModuleList(expert() for _ in range(3)).eval()
    for each in experts:
        each.train()
        each[1].eval()
    assert unlike(experts) is None
    for each in experts:
        each.train()
    assert unlike(experts) == "expert 0 is in training mode", "a dropout does ask"


def test_no_rows_at_all_are_refused():
    model, backend = stack(NumpyEnds()), RecordingBackend()
    with torch.no_grad(), pytest.warns(capture.CaptureWarning, match="no rows"):
        assert torch.compile(model, backend=backend)(tokens()[:0]).shape == (0, 10, WIDTH)
    assert not any(nodes_of(gm, LAYER) for gm in backend.graphs)


def test_zero_initialized_experts_are_trusted():
    backend = RecordingBackend(run=lambda gm: lambda *inputs: (inputs[0],))
    with torch.no_grad():
        torch.compile(stack(zeroed(NumpyEnds())), backend=backend)(tokens())
    assert len(backend.graphs) == 1 and capture.refusals() == ()


def test_checking_leaves_the_model_and_the_random_numbers_alone():
    model = stack(NumpyEnds())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    backend = RecordingBackend(run=lambda gm: lambda *inputs: (inputs[0],))
    with torch.no_grad():
        torch.compile(model, backend=backend)(tokens())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_of_one_structure_are_checked_once(monkeypatch):
    from moeca_compile.capture import trust

    checked = []
    check = trust._check
    monkeypatch.setattr(trust, "_check", lambda *args: checked.append(args) or check(*args))
    backend = RecordingBackend(run=lambda gm: lambda *inputs: (inputs[0],))
    with torch.no_grad():
        torch.compile(stack(NumpyEnds(), NumpyEnds(), NumpyEnds(1)), backend=backend)(tokens())
    assert len(backend.graphs) == 1
    assert len(checked) == 2  # k = 2 and k = 1


def test_rows_of_another_rank_are_refused():
    class Batched(NumpyEnds):
        def forward(self, x):
            weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
            return self.moe_infer(x, index.view(-1), weight.view(-1, 1))

        def moe_infer(self, x, ids, weights):
            out = torch.zeros_like(x.view(-1, WIDTH))
            order = ids.argsort()
            ends = ids.bincount().cpu().numpy().cumsum(0)
            for e, end in enumerate(ends):
                start = 0 if e == 0 else ends[e - 1]
                rows = order[start:end] // self.top_k
                y = self.experts[e](x.view(-1, WIDTH)[rows]) * weights[order[start:end]]
                out.index_add_(0, rows, y)
            return out.view(x.shape)

    model, backend = Batched().eval(), RecordingBackend()
    with torch.no_grad(), pytest.warns(capture.CaptureWarning, match="`x` has 3 dimensions"):
        got = torch.compile(model, backend=backend)(tokens())
        torch.testing.assert_close(got, model(tokens()))
