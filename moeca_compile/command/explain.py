"""`moeca explain`: a model is captured and matched, nothing is compiled, and each recipe is planned."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from moeca_compile.backend import backend_with, compile_graph
from moeca_compile.command.named import CommandError, called, raised
from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CapturedGraph, CompiledGraph
from moeca_compile.notes import Notes
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.rewrite.kinds import REUSING, StepKind
from moeca_compile.policies import RECIPES
from moeca_compile.reporting.collect import regions_of, report
from moeca_compile.reporting.places import places_of
from moeca_compile.reporting.report import GraphBreak, Region
from moeca_compile.runtime.engine import Stages


@dataclass(frozen=True)
class Subject:
    """A model, and what it is called with."""

    model: nn.Module
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What one recipe does with the model.

    Attributes:
        regions: all that was recognized.
        cache_bytes: of the caches of one stream.
        full_step, least, most: predicted FLOPs of a full step, and of a cache step that recomputes nothing, or all
            that it may.
    """

    recipe: str
    regions: tuple[Region, ...]
    cache_bytes: int
    full_step: float
    least: float
    most: float


@dataclass(frozen=True)
class Explanation:
    """All that is known of a model without compiling it.

    Attributes:
        timesteps: the inputs that may be the timestep.
        places: file:line of the code of regions, by name.
    """

    model: str
    parameters: int
    device: str
    dtype: str
    graphs: int
    graph_breaks: tuple[GraphBreak, ...]
    timesteps: tuple[str, ...]
    choices: tuple[Choice, ...]
    places: Mapping[str, str]
    warnings: tuple[str, ...]


NO_INPUTS = (
    "{0} returned a model and nothing to call it with. Give --inputs module:function: it gets the model, and returns "
    "a tuple of arguments or a dict of them by name. Or let {0} return (model, inputs)"
)
NO_MODEL = "{0} returned a {1}. Let it return the model, an nn.Module, or (model, inputs)"
NO_ARGUMENTS = "{0} returned a {1}. Let it return a tuple of the model's arguments, or a dict of them by name"
NO_FIT = "the model cannot be called with these inputs: it {0}. Its forward is {1}, and the inputs are ({2})"
NO_META = (
    "on the meta device there are no values, so dispatch to experts can be neither checked nor run: it {0}. Leave "
    "out --device meta, and make the model with fewer or narrower blocks"
)


def subject_named(factory: str, inputs: str | None, device: str) -> Subject:
    """The model that `factory` makes on `device`, in eval mode, with its inputs.

    Raises CommandError where a name leads nowhere, a function raises, or the inputs do not fit.
    """
    with torch.device(device), torch.no_grad():
        made = called(factory)
        model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise CommandError(NO_MODEL.format(factory, type(model).__name__))
        if inputs is not None:
            given = called(inputs, model)
        elif given is None:
            raise CommandError(NO_INPUTS.format(factory))
        if not isinstance(given, (tuple, list, dict)):
            raise CommandError(NO_ARGUMENTS.format(inputs or factory, type(given).__name__))
        positional, named = ((), given) if isinstance(given, dict) else (tuple(given), {})
        subject = Subject(model.eval(), positional, named)
        if device != "meta":  # on which the model's own dispatch cannot run: it depends on data
            _check(subject)
        return subject


def _check(subject: Subject) -> None:
    """Raise CommandError where the model cannot be called."""
    try:
        subject.model(*subject.arguments, **subject.keywords)
    except Exception as error:
        values = [*map(_described, subject.arguments)]
        values += [f"{name}={_described(value)}" for name, value in subject.keywords.items()]
        form = f"forward{inspect.signature(subject.model.forward)}"
        raise CommandError(NO_FIT.format(raised(error), form, ", ".join(values))) from error


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def explain(subject: Subject, recipes: Sequence[str]) -> Explanation:
    """Capture the model by one call of it, op by op, and plan each recipe. Seconds for a small model.

    Raises CommandError for a model that depends on values which the meta device does not have.
    """
    planned: dict[str, list[CompiledGraph]] = {recipe: [] for recipe in recipes}

    def plan(captured: CapturedGraph, inputs: Sequence[Any], config: MoecaConfig, notes: Notes) -> CompiledGraph:
        @cache
        def exported() -> fx.GraphModule:
            return to_functional_aten(captured.gm, inputs)

        for recipe, graphs in planned.items():
            graphs.append(compile_graph(captured, inputs, _config(recipe), Notes(), lambda *_: exported()))
        return compile_graph(captured, inputs, config, notes, lambda *_: exported())

    backend = backend_with(Stages(plan, lambda compiled, kind, *_: compiled.function(kind)))
    # What runs is the model itself: whatever else is needed to go on after a graph break.
    options: dict[str, Any] = {"recipe": "none", "validate": False, "lowering": "eager"}
    compiled = torch.compile(subject.model, backend=backend, options=options)
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        try:
            compiled(*subject.arguments, **subject.keywords)
        except NotImplementedError as error:  # an op without values, of code that was not captured
            raise CommandError(NO_META.format(raised(error))) from error
    found, first = report(compiled), next(iter(planned.values()))
    choices = tuple(_choice(recipe, graphs) for recipe, graphs in planned.items())
    return Explanation(
        model=type(subject.model).__name__,
        parameters=sum(weight.numel() for weight in subject.model.parameters()),
        device=found.device or "no device",
        dtype=found.dtype or "no dtype",
        graphs=found.graphs,
        graph_breaks=found.graph_breaks,
        timesteps=tuple(graph.captured.names[i] for graph in first for i in graph.timesteps),
        choices=choices,
        places=places_of(subject.model, {region.name for choice in choices for region in choice.regions}),
        warnings=tuple(dict.fromkeys(_ours(told))),
    )


def _config(recipe: str) -> MoecaConfig:
    unbounded = {"max_cache_bytes": None} if RECIPES[recipe].caches else {}
    return MoecaConfig.from_options({"recipe": recipe, "validate": False, **unbounded})


def _choice(recipe: str, graphs: Sequence[CompiledGraph]) -> Choice:
    return Choice(
        recipe,
        tuple(region for graph in graphs for region in regions_of(graph)),
        sum(graph.plan.nbytes for graph in graphs),
        sum(graph.plan.flops(StepKind()) + graph.plan.flops_handed_on for graph in graphs),
        sum(graph.plan.flops(REUSING) + graph.plan.flops_beside_steps for graph in graphs),
        sum(graph.plan.flops(REUSING, *_most(graph)) + graph.plan.flops_beside_steps for graph in graphs),
    )


def _most(graph: CompiledGraph) -> tuple[float, float]:
    """The largest fractions of tokens and branches that a cache step recomputes."""
    fraction = graph.plan.capacities[-1] / graph.plan.sizes[1]
    return fraction, fraction


def _ours(told: Sequence[warnings.WarningMessage]) -> list[str]:
    """The texts of the package's own warnings."""
    texts = [(each.category.__module__, str(each.message)) for each in told]
    return [text.removeprefix("moeca: ") for module, text in texts if module.startswith("moeca_") or "moeca:" in text]
