"""Layers whose code no idiom reads are run: one graph, a marker for what they computed, the same numbers."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeca_compile import capture
from tests.capture.layers import EXPERTS, WIDTH, MoE, stack, tokens
from tests.capture.running import FIXED, VARIABLE, Loop, assert_captured, compiled, refusal_of
from tests.harness import RecordingBackend, nodes_of

log = logging.getLogger(__name__)


class KeepsTheRouting(Loop):
    def after(self, out, index):
        self.last = index.detach()
        self.steps = getattr(self, "steps", 0) + 1
        return out


class CountsUse(Loop):
    def __init__(self):
        super().__init__()
        self.register_buffer("used", torch.zeros(EXPERTS))

    def before(self, rows, index):
        self.used += torch.bincount(index.reshape(-1), minlength=EXPERTS)
        return index


class LogsAndChecks(Loop):
    def before(self, rows, index):
        try:
            if not rows.isfinite().all():
                log.warning("not finite")
        finally:
            log.debug("%s rows", len(rows))
        with contextlib.suppress(ValueError):
            assert rows.dim() == 2
        return index


class Casts(Loop):
    def picked(self, rows, token):
        return rows[token].double().to(rows.dtype)

    def made(self, y, like):
        return y.type_as(like)


class Closure(Loop):
    def after(self, out, index):
        def scaled(value, by):
            return value * by

        return sum(scaled(part, 0.5) for part in (out, out))


class ThroughNumpy(MoE):
    """Rows are sorted on the host."""

    def route_to_experts(self, rows, index, weight):
        ids = index.reshape(-1).cpu().numpy()
        out = rows.new_zeros(rows.shape)
        for e in sorted(set(ids.tolist())):
            branch = torch.from_numpy((ids == e).nonzero()[0])
            token = branch // self.top_k
            out[token] += self.experts[e](rows[token]) * weight.reshape(-1)[branch].unsqueeze(1)
        return out


class Split(MoE):
    """Groups are run together and put back in another method, by gathers."""

    def route_to_experts(self, rows, index, weight):
        order = index.flatten().argsort(stable=True)
        made = self.run(rows[order // self.top_k], torch.bincount(index.flatten(), minlength=EXPERTS))
        return self.put_back(made, order, weight)

    def run(self, rows, counts):
        parts = rows.split(counts.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])

    def put_back(self, made, order, weight):
        back = made[order.argsort()].unflatten(0, weight.shape)
        return torch.einsum("tkd,tk->td", back, weight)


class TouchesIdleOnes(MoE):
    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token = torch.where((index == e).any(-1))[0]
            if len(token):
                factor = (weight[token] * (index[token] == e)).sum(-1)
                out.index_add_(0, token, self.experts[e](rows[token]) * factor[:, None])
            else:
                out = out + 0 * self.experts[e](torch.ones(1, WIDTH)).sum()
        return out


class Unweighted(MoE):
    def route_to_experts(self, rows, index, weight):
        ids, out = index.view(-1), torch.zeros_like(rows)
        order = ids.argsort()
        ends = ids.bincount().cpu().numpy().cumsum(0)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            token = order[start:end] // self.top_k
            out.index_add_(0, token, self.experts[e](rows[token]))
        return out


class OntoTheRows(MoE):
    """The sum starts from what is no zero, and each expert runs once a slot."""

    def route_to_experts(self, rows, index, weight):
        out = rows.clone()
        for e, expert in enumerate(self.experts):
            for slot in range(self.top_k):
                chosen = index[:, slot] == e
                if chosen.any():
                    out[chosen] = torch.addcmul(out[chosen], expert(rows[chosen]), weight[chosen, slot, None])
        return out


STATEMENTS = [KeepsTheRouting, CountsUse, LogsAndChecks, Casts, Closure]
SPELLINGS = [ThroughNumpy, Split, TouchesIdleOnes, Unweighted, OntoTheRows]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [*STATEMENTS, *SPELLINGS])
def test_what_stands_beside_a_dispatch_and_how_it_is_spelled_do_not_matter(layer):
    assert_captured(stack(layer(), layer()))


def test_half_precision():
    assert_captured(stack(Split()).bfloat16(), dtype=torch.bfloat16, rtol=0.05, atol=0.05)


def test_experts_of_a_dict_by_a_map():
    class Named(MoE):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleDict({f"expert {e}": expert for e, expert in enumerate(self.experts)})

        def forward(self, x):
            probs = self.router(x).softmax(-1)
            mask = torch.zeros_like(probs).scatter_(-1, probs.topk(self.top_k, -1).indices, 1)
            out = torch.zeros_like(x)
            for e in range(EXPERTS):
                mine = mask[..., e].bool()
                if mine.any():
                    out[mine] += (probs * mask)[..., e][mine][:, None] * self.experts[f"expert {e}"](x[mine])
            return x + out

    assert_captured(stack(Named()))


class OfSamples(MoE):
    """All tokens of a sample go to the same experts; `seen` says what the router reads."""

    def __init__(self, seen=lambda x, c: c, **how):
        super().__init__(experts=3, **how)
        self.seen = seen

    def forward(self, x, c):
        weight, index = self.router(self.seen(x, c)).softmax(-1).topk(self.top_k, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sample, slot = torch.where(index == e)
            out.index_add_(0, sample, expert(x[sample]) * weight[sample, slot, None, None])
        return x + out


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(-2, keepdim=True))


@pytest.mark.parametrize("seen", [lambda x, c: c, lambda x, c: x.mean(1), lambda x, c: c + x[:, 0]])
def test_experts_of_whole_samples(seen):
    assert_captured(OfSamples(seen).eval(), torch.randn(2, WIDTH))


def test_experts_of_whole_samples_that_mix_tokens():
    model = OfSamples(expert=lambda: Mixing(WIDTH, WIDTH)).eval()
    assert "depends on the other tokens" in refusal_of(model, torch.randn(2, WIDTH))


class DenseTwice(MoE):
    """All experts run on all rows; their sum stands there twice, and the first one is for nothing."""

    def route_to_experts(self, rows, index, weight):
        made = torch.stack([expert(rows) for expert in self.experts])
        each = torch.zeros(len(rows), EXPERTS).scatter(1, index, weight)
        out = torch.einsum("en,end->nd", each.T, made)
        out = torch.einsum("ne,end->nd", each, made)
        return out


class DenseAndMean(DenseTwice):
    """Something else reads the experts' outputs."""

    def route_to_experts(self, rows, index, weight):
        made = torch.stack([expert(rows) for expert in self.experts])
        each = torch.zeros(len(rows), EXPERTS).scatter(1, index, weight)
        return torch.einsum("ne,end->nd", each, made) + made.mean(0).tanh()


class Soft(DenseTwice):
    def route_to_experts(self, rows, index, weight):
        made = torch.stack([expert(rows) for expert in self.experts])
        return torch.einsum("ne,end->nd", self.router(rows).softmax(-1), made)


class PartOfAList(MoE):
    """The last one of the list is no expert that chooses."""

    def forward(self, x):
        experts = self.experts[:-1]
        weight, index = self.router(x).softmax(-1)[..., : len(experts)].transpose(1, 2).topk(4, -1)
        hot = F.one_hot(index, x.shape[1]).to(x)
        rows = torch.einsum("becs,bsd->becd", hot, x)
        made = torch.stack([expert(rows[:, e]) for e, expert in enumerate(experts)], 1)
        return torch.einsum("becs,bec,becd->bsd", hot, weight, made)


@pytest.mark.parametrize(("layer", "marker"), [(DenseTwice, FIXED), (PartOfAList, VARIABLE)])
def test_layers_that_ask_the_host_for_nothing(layer, marker):
    assert_captured(nn.Sequential(nn.LayerNorm(WIDTH), layer()).eval(), marker=marker)


@pytest.mark.parametrize("layer", [DenseAndMean, Soft])
def test_near_misses_of_layers_that_run_all_experts_on_all_rows(layer):
    """Plain torch.compile has them in one graph, too."""
    model = nn.Sequential(nn.LayerNorm(WIDTH), layer()).eval()
    found, backend = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens()), model(tokens()))
    (graph,) = backend.graphs
    assert not nodes_of(graph, FIXED) and not nodes_of(graph, VARIABLE)


class Threshold(MoE):
    """As many experts as are likely enough: no token has a fixed number."""

    def forward(self, x):
        rows = x.flatten(0, -2)
        probs = self.router(rows).softmax(-1)
        chosen = probs > self.limit(probs)
        out = torch.zeros_like(rows)
        seen = []
        for e, expert in enumerate(self.experts):
            token = chosen[:, e].nonzero()[:, 0]
            seen.append(len(token))
            out.index_add_(0, token, expert(rows[token]) * probs[token, e, None])
        return x + out.view_as(x)

    def limit(self, probs):
        return 1 / EXPERTS


def test_a_map_with_as_many_experts_as_there_are():
    assert_captured(stack(Threshold()), marker=VARIABLE)


@pytest.mark.parametrize("coupled", [False, True])
def test_whether_a_map_depends_on_the_other_samples(coupled):
    class Limited(Threshold):
        def limit(self, probs):
            return probs.mean(0) if coupled else 1 / EXPERTS

    found, backend = compiled(stack(Limited()))
    with torch.no_grad():
        found(tokens())
    (marker,) = nodes_of(backend.graphs[0], VARIABLE)
    assert marker.args[7] is coupled


class Packed(MoE):
    """Packed experts; `first` and `second` are an expert's matrices."""

    def __init__(self, inner=20):
        super().__init__(expert=nn.Identity)
        self.inner = inner
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(WIDTH, EXPERTS * inner)),
            nn.Parameter(torch.randn(EXPERTS, inner, WIDTH)),
        )

    def first(self, e):
        return self.w1[:, e * self.inner : (e + 1) * self.inner]

    def second(self, e):
        return self.w2[e]

    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e in range(EXPERTS):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, F.gelu(rows[token] @ self.first(e)) @ self.second(e) * weight[token, slot, None])
        return out


class Viewed(Packed):
    def first(self, e):
        return self.w1.view(WIDTH, EXPERTS, -1).unbind(1)[e]


class InGroups(Packed):
    def route_to_experts(self, rows, index, weight):
        order, ends = self.sorted(index)
        w1 = self.w1.view(WIDTH, EXPERTS, -1).transpose(0, 1).contiguous()
        h = torch._grouped_mm(rows[order // self.top_k].bfloat16(), w1.bfloat16(), offs=ends)
        return self.put_back(torch._grouped_mm(F.silu(h), self.w2.bfloat16(), offs=ends).float(), order, weight)

    def sorted(self, index):
        return index.flatten().argsort(stable=True), torch.bincount(index.flatten()).cumsum(0).to(torch.int32)

    def put_back(self, made, order, weight):
        return made.new_zeros(len(weight), WIDTH).index_add_(
            0, order // self.top_k, made * weight.flatten()[order, None]
        )


@pytest.mark.parametrize("layer", [Packed, Viewed])
def test_packed_experts(layer):
    assert_captured(stack(layer(), layer()), rtol=1e-4, atol=1e-4)


def test_other_backends_and_training_run_the_original():
    model = stack(Split())
    backend = RecordingBackend(ours=False)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(tokens()), model(tokens()))
        found, ours = compiled(model.train())
        torch.testing.assert_close(found(tokens()), model(tokens()))
    assert not any(nodes_of(graph, FIXED) for graph in [*backend.graphs, *ours.graphs])
    assert capture.refusals() == ()


def test_running_changes_nothing_of_the_layer_and_draws_no_random_numbers():
    model = stack(CountsUse())
    found, _ = compiled(model)
    state = torch.get_rng_state()
    with torch.no_grad():
        found(tokens())
    assert not model[0].moe.used.any() and torch.equal(torch.get_rng_state(), state)


class OnlyActive(nn.Module):
    """An idiom knows it but for the branches that are left out, as many as the weights say."""

    def __init__(self, width=16):
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.w1, self.w2 = (nn.Parameter((torch.randn(EXPERTS, width, width) / 4).bfloat16()) for _ in range(2))

    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, index = self.router(rows).softmax(-1).topk(2, -1)
        flat, factor = index.flatten(), weight.where(weight > 0.3, 0).bfloat16().flatten()
        active = torch.where(factor != 0)[0]
        order = active[flat[active].argsort(stable=True)]
        ends = torch.bincount(flat[active], minlength=EXPERTS).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(rows[order // 2].bfloat16(), self.w1, offs=ends)
        made = torch._grouped_mm(F.silu(h), self.w2, offs=ends)
        out = torch.zeros_like(rows).bfloat16()
        out.index_add_(0, order // 2, made * factor[order, None])
        return out.view_as(x).float()


def test_branches_of_weight_zero_that_are_left_out():
    model, x = nn.Sequential(nn.LayerNorm(16), OnlyActive()).eval(), torch.randn(2, 10, 16)
    found, backend = compiled(model)
    with torch.no_grad():
        for each in (x, 5 * x):
            torch.testing.assert_close(found(each), model(each), rtol=0.05, atol=0.05)
    (graph,) = backend.graphs
    assert len([*nodes_of(graph, FIXED), *nodes_of(graph, VARIABLE)]) == 1 and capture.refusals() == ()


# rows and samples apart, by labels

NONE = 10


class Labelled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return x + self.layer(x, labels)


class RouterOfSome(Loop):
    """The router sees samples with a label only; the others go to the last expert."""

    def forward(self, x, labels):
        rows, null = x.flatten(0, 1), (labels == NONE).repeat_interleave(x.shape[1])
        weight, index = rows.new_zeros(len(rows), self.top_k), rows.new_zeros(len(rows), self.top_k).long()
        if null.any():
            weight[null, 0] = 1.0
            index[null] = torch.tensor([EXPERTS - 1, 0])
        if (~null).any():
            at = torch.where(~null)[0]
            weight[at], index[at] = self.scores(rows[at]).topk(self.top_k, -1)
        return self.route_to_experts(rows, index, weight).view_as(x)

    def scores(self, rows):
        return self.router(F.normalize(rows, dim=-1)).softmax(-1)


class ChoiceOfSome(MoE):
    """Experts choose among the tokens of samples with a label; one expert is there for the others."""

    def __init__(self):
        super().__init__()
        self.null = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, x, labels):
        out, some = torch.zeros_like(x), labels != NONE
        if some.any():
            out[some] = self.chosen(x[some])
        if (~some).any():
            out[~some] = self.null(x[~some])
        else:
            out = out + 0 * self.null(torch.zeros(1, 1, WIDTH)).sum()
        return out

    def chosen(self, x):
        weight, index = self.router(x).softmax(-1).transpose(1, 2).topk(4, -1)
        hot = F.one_hot(index, x.shape[1]).to(x)
        rows = torch.einsum("becs,bsd->becd", hot, x)
        made = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], 1)
        return torch.einsum("becs,bec,becd->bsd", hot, weight, made)


@pytest.mark.parametrize(("layer", "marker"), [(RouterOfSome, FIXED), (ChoiceOfSome, VARIABLE)])
def test_what_runs_on_samples_with_a_label_runs_on_all_rows(layer, marker):
    model = Labelled(layer()).eval()
    found, backend = compiled(model)
    with torch.no_grad():
        for labels in ([3, NONE], [NONE, 0], [NONE, NONE], [1, 2]):
            given = torch.tensor(labels)
            torch.testing.assert_close(found(tokens(), given), model(tokens(), given))
    assert capture.refusals() == ()
    (graph,) = backend.graphs
    assert len(nodes_of(graph, marker)) == 1


class MixesPickedRows(RouterOfSome):
    """On all rows, it would see others."""

    def scores(self, rows):
        return self.router(rows - rows.mean(0)).softmax(-1)


class RareLabels(RouterOfSome):
    def scores(self, rows):
        return self.router(rows).softmax(-1)

    def forward(self, x, labels):
        return super().forward(x, labels) * (2 if labels.sum() > 1000 else 1)


@pytest.mark.parametrize("layer", [MixesPickedRows, RareLabels])
def test_near_misses_of_rows_apart(layer):
    """The router stays as it is, and the graph breaks there."""
    model = Labelled(layer()).eval()
    found, backend = compiled(model)
    with torch.no_grad():
        for labels in ([3, NONE], [NONE, NONE], [900, 900]):
            given = torch.tensor(labels)
            torch.testing.assert_close(found(tokens(), given), model(tokens(), given))
    assert len(backend.graphs) > 1


# near misses
