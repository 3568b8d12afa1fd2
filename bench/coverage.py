"""What is captured and cached in each kind of model, and how exact the rewritten steps are: writes docs/coverage.md.

python -m bench.coverage
python -m bench.coverage --model DSMoE --model HiDream --out elsewhere.md

The models are the reduced reference families of examples/families and the MoE image transformers of the installed
diffusers, at tiny sizes with random weights. Each is compiled with backend="moeca" and called twice: a full step,
then a cache step at another timestep that recomputes everything through the caches, as the backend's own validation
does. Both must equal the eager model. Steps run as eager functions, without tracing or Inductor, so that a model
takes seconds; what is captured, matched and computed is the same.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import moeca_compile
from examples import families
from examples.families.common import randomize
from examples.machine import environment
from examples.testbed.arguments import whole_number
from moeca_compile import capture
from moeca_compile.backend import backend_with, compile_graph
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.reporting.report import Report
from moeca_compile.runtime.engine import Stages

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
IN_WARNINGS = "see the warnings"  # the reason that a report gives for a region with a warning of its own
TIMESTEPS = (900.0, 860.0)
OPTIONS: dict[str, Any] = {"recipe": "moeca", "capacities": (1.0,)}
WITHOUT_EXPERTS: dict[str, Any] = {"recipe": "fora", "full_every": 1}
"""For dense models: layer-wise caching, which needs no routing. It cannot recompute, so all steps are full."""

Call = Callable[[Callable[..., Any], float], Tensor]
"""Calls a model, compiled or not, with its inputs at a timestep."""


@dataclass(frozen=True)
class Subject:
    """A model to check. `make` returns the model and a function that calls it."""

    name: str
    make: Callable[[], tuple[nn.Module, Call]]
    options: dict[str, Any] = field(default_factory=lambda: OPTIONS)


@dataclass
class Row:
    """The results for one model. Errors are the largest difference over the largest magnitude."""

    name: str
    failure: str = ""
    graphs: int = 0
    breaks: list[str] = field(default_factory=list)
    experts: tuple[int, int] = (0, 0)
    """MoE layers: cached, in the model."""
    attentions: tuple[int, int] = (0, 0)
    """Attentions: cached outputs, calls in the model."""
    skipped: list[str] = field(default_factory=list)
    full: float = 0.0
    recomputed: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)


# --- the models ---------------------------------------------------------------------------------------------


def subjects() -> tuple[Subject, ...]:
    with_experts = [name for name in families.FAMILIES if name != "DiT"]
    reduced = (Subject(name, lambda name=name: _family(name)) for name in with_experts)  # type: ignore[misc]
    return (
        Subject("DiT", lambda: _family("DiT"), WITHOUT_EXPERTS),
        *reduced,
        Subject("HiDream", _hidream),
        Subject("Nucleus", lambda: _nucleus(grouped=False)),
        Subject("Nucleus, grouped_mm, bfloat16", lambda: _nucleus(grouped=True)),
    )


def _family(name: str) -> tuple[nn.Module, Call]:
    model = families.reduced(name)
    x, t, y = families.inputs_for(model)
    return model, lambda call, at: call(moved(x, at), torch.full_like(t, at), y)


def moved(x: Tensor, at: float) -> Tensor:
    """The picture at a time: a sampler moves it, and another picture's caches would not be read."""
    return x * (1 - at / (20 * max(TIMESTEPS)))


def _hidream() -> tuple[nn.Module, Call]:
    """Two double-stream and two single-stream blocks, all with experts."""
    from diffusers import HiDreamImageTransformer2DModel

    torch.manual_seed(0)
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[12, 10],
        text_emb_dim=6,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 0, 1],
        force_inference_output=True,
    )
    randomize(model, seed=0)
    x, long, short, pooled = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 3, 12),
        torch.randn(2, 2, 5, 10),
        torch.randn(2, 6),
    )

    def run(call: Callable[..., Any], at: float) -> Tensor:
        return call(moved(x, at), torch.full((2,), at), long, short, pooled, return_dict=False)[0]

    return model.eval().requires_grad_(False), run


def _nucleus(grouped: bool) -> tuple[nn.Module, Call]:
    """Six blocks, of which the fourth and fifth have experts; the model makes the first three and the last dense.

    torch 2.13 can trace a grouped matrix product in bfloat16 only.
    """
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformer2DModel

    model = NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
        use_grouped_mm=grouped,
    )
    randomize(model, seed=0)
    dtype = torch.bfloat16 if grouped else torch.float32
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, *size, generator=generator).to(dtype) for size in ((16, 16), (5, 24)))

    def run(call: Callable[..., Any], at: float) -> Tensor:
        arguments = {"encoder_hidden_states": text, "timestep": torch.full((2,), at), "return_dict": False}
        return call(moved(x, at), [(1, 4, 4)], **arguments)[0]

    return model.eval().requires_grad_(False), run


# --- checking one model -------------------------------------------------------------------------------------


def _recomputing(compiled: CompiledGraph, kind: StepKind, *_: Any) -> StepFunction:
    """A step as an eager function; a cache step recomputes everything."""
    forced = StepKind(False, False, compiled.plan.capacities[-1], forced=True)  # capacity for all tokens
    return torch.no_grad()(compiled.function(kind if kind.full else forced))


@contextmanager
def without_warnings() -> Iterator[None]:
    """Warnings are read from the report instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BACKEND = backend_with(Stages(compile_graph, _recomputing))


class _Attentions(TorchFunctionMode):
    """Counts the calls of scaled_dot_product_attention."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


FOUND_ANEW = {"lowering": "eager", "disk_cache": False}
"""Traced, validated and run op by op, whatever is on disk."""


def look_at(subject: Subject) -> Row:
    """Compile and call the model; a failure gives a row too."""
    torch._dynamo.reset()
    row = Row(subject.name)
    before = _refusals()
    try:
        model, call = subject.make()
        with torch.no_grad(), without_warnings():
            with _Attentions() as counter:
                wanted = [call(model, TIMESTEPS[0])]
            wanted += [call(model, at) for at in TIMESTEPS[1:]]
            compiled = torch.compile(model, backend=BACKEND, options={**subject.options, **FOUND_ANEW})
            found = [call(compiled, at) for at in TIMESTEPS]
    except Exception as error:  # the table says so; the other models still have their rows
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row
    row.full, row.recomputed = (relative_error(one, other) for one, other in zip(found, wanted, strict=True))
    report = moeca_compile.report(compiled)
    warned = [text for text in report.warnings if text not in before]
    _read(row, report, warned, model, counter.count)
    return row


def _read(row: Row, report: Report, warned: Sequence[str], model: nn.Module, attentions: int) -> None:
    cached = [region.kind for region in report.regions if region.status == "cached"]
    layers = _layers_with_experts(model)
    row.graphs = report.graphs
    row.breaks = [f"{Path(b.where).name}: {b.reason}" for b in report.graph_breaks]
    row.experts = cached.count("experts"), layers
    row.attentions = cached.count("attention"), attentions
    skipped = [region for region in report.regions if region.status != "cached"]
    row.skipped = [f"{one.kind} {one.name}: {one.reason}" for one in skipped if one.reason != IN_WARNINGS]
    if len(row.skipped) < len(skipped) or layers > row.experts[0]:
        reasons = " ".join(row.skipped)
        row.skipped += [_without_folder(warning) for warning in warned if warning.rpartition(": ")[2] not in reasons]
    row.validation = dict(report.validation_errors)


def _layers_with_experts(model: nn.Module) -> int:
    """Modules that hold experts, and those whose own parameters are packed experts, (experts, ...)."""
    listed = [each for each in model.modules() if "experts" in each._modules]
    inside = {each for layer in listed for each in layer.modules()}
    own = {each: list(each.parameters(recurse=False)) for each in model.modules() if each not in inside}
    return len(listed) + sum(any(one.dim() == 3 and len(one) > 1 for one in held) for held in own.values())


def _refusals() -> set[str]:
    """Dispatch that capture has refused so far in this process; every report lists all of it."""
    return {f"{r.where} {r.method}: {r.reason}" for r in capture.refusals()}


def _without_folder(text: str) -> str:
    return " ".join(Path(word).name if word.startswith("/") else word for word in text.split(" "))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# --- the document ---------------------------------------------------------------------------------------------

_HEAD = """# Coverage

What is captured and cached in each kind of model, at tiny sizes with random weights, and how exact its steps are.
Written by `python -m bench.coverage`; nothing here is written by hand. Measured with {versions}.

- *Graphs*: 1 is the whole model. *Breaks*: where Dynamo ended a graph; see below.
- *MoE layers*, *attentions*: cached of those in the model. An attention of two token streams has an output for each,
  and each counts.
- *Full*: greatest error, relative to the output's scale, of a full step against the model in eager.
  *Recomputed*: that of the next step, at another timestep, with everything recomputed through the caches; where
  nothing is cached, the model itself. *Validated*: the worst of the backend's own checks before first use.
- The recipe is `moeca`; for DiT, which has no experts, `fora`, and its second step is full too.
- Steps run as eager functions, without Inductor.

| model | graphs | breaks | MoE layers | attentions | full | recomputed | validated |
|---|---|---|---|---|---|---|---|
"""


def document(rows: Sequence[Row], where: dict[str, Any]) -> str:
    """The page as Markdown: the table, then graph breaks and what was skipped."""
    versions = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = [_HEAD.format(versions=versions) + "\n".join(_line(row) for row in rows)]
    for title, of in (("Graph breaks", lambda row: row.breaks), ("Skipped, and why", _reasons)):
        found = [(row.name, _counted(of(row))) for row in rows if of(row)]
        lines += [f"\n## {title}\n", *(f"- {name}: {text}" for name, texts in found for text in texts)]
        lines += [] if found else ["None."]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    if row.failure:
        return f"| {row.name} | failed |" + " - |" * 6
    cells = [
        row.name,
        row.graphs,
        len(row.breaks),
        *("{} of {}".format(*pair) for pair in (row.experts, row.attentions)),
    ]
    errors = [row.full, row.recomputed, max(row.validation.values(), default=float("nan"))]
    return (
        "| " + " | ".join([*map(str, cells), *(f"{error:.1e}" if error == error else "-" for error in errors)]) + " |"
    )


def _reasons(row: Row) -> list[str]:
    return [row.failure] if row.failure else row.skipped


def _counted(texts: Sequence[str]) -> list[str]:
    """Each text once, with its count. Texts that differ only in the numbers of a module path count as one."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, _, reason = text.partition(": ")
        same = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault(f"{same}: {reason}", []).append(text)
    return [f"{same} ({len(found)} times)" if len(found) > 1 else found[0] for same, found in groups.items()]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [subject.name for subject in subjects()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", action="append", choices=names, help="may be given several times (all)")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of torch (1)")
    parser.add_argument("--out", type=Path, default=DOCUMENT, metavar="MD", help=f"({DOCUMENT})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for subject in subjects():
        if not args.model or subject.name in args.model:
            rows.append(look_at(subject))
            print(_line(rows[-1]), flush=True)
    args.out.write_text(document(rows, environment(torch.device("cpu"), torch.float32)))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
