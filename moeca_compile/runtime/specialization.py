"""One graph at one set of input shapes: exported, matched, planned; its programs by step kind; its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.lower.program import Program
from moeca_compile.lower.validate import ValidationError, same_outputs, sound_regions, token_dtypes, undisturbed
from moeca_compile.ops import triton as kernels
from moeca_compile.passes.analysis.graph import module_path
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.match.match_regions import match_regions
from moeca_compile.passes.normalize.to_one_device import to_one_device
from moeca_compile.passes.rewrite.step import COUNTERS, StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult, step_function
from moeca_compile.passes.runner import normalize
from moeca_compile.plan import Plan, plan_step
from moeca_compile.policies import Policy, policy_for
from moeca_compile.policies.plain import Plain
from moeca_compile.runtime import scope
from moeca_compile.runtime.cuda_graphs import CudaGraphs, CudaRecorder
from moeca_compile.runtime.record import Record
from moeca_compile.runtime.schedule import Fresh
from moeca_compile.runtime.session import Position, Sessions, Stream, Timestep
from moeca_compile.runtime.timesteps import TimestepInput
from moeca_compile.runtime.upload import upload

_RESTLESS = 8
"""So many generations of a step or two, one after the other, are no generations."""

_PROMOTED_ABOVE = 1.25
"""How much of its capacity a step must need before the next ones get a larger one, and a graph of their own."""

_UNCLEAR = 3
"""Calls at which all candidates for the timestep changed, before a warning says that nothing is cached."""


@dataclass
class Tally:
    """Steps of one kind, and the sum of their counters (layers, COUNTERS)."""

    steps: int = 0
    counts: Tensor | None = None


class Specialization:
    """See the module's docstring. Built from real inputs, whose parameters are those of the model."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        user_inputs: Sequence[bool],
        config: MoecaConfig,
        record: Record,
    ) -> None:
        self.config, self.record = config, record
        # The names in the model's signature, as far as Dynamo tells.
        self.names = [n.name.removeprefix("l_").rstrip("_") for n in gm.graph.nodes if n.op == "placeholder"]
        with record.timed("capture"):
            exported, place = to_functional_aten(gm, inputs), _place(inputs)
            self.module, self.uploaded = to_one_device(exported, inputs, user_inputs, place)
            self.graph = self.module.graph
        self.device = place
        inputs = self.placed(inputs)
        with record.timed("match"):
            normalize(self.graph)
            self.placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
            arguments = {n for n, user in zip(self.placeholders, user_inputs, strict=True) if user}
            self.regions = match_regions(self.graph, arguments)
        self.mutated: tuple[int, ...] = self.module.meta["mutated_inputs"]
        self.dtype = self._example(inputs).dtype
        self.programs: dict[StepKind, StepFunction] = {}
        self.tallies: dict[StepKind, Tally] = {}
        if config.validate:
            with record.timed("validate"):
                self.regions = sound_regions(self.graph, self.regions, config, inputs, record)
        self._plan()
        self.graphs = self._cuda_graphs(user_inputs, self._warn_of_waits())
        self.stateless = Stream({})
        """What steps of a model that runs uncached go by."""
        self.caching = bool(self.sessions.specs)
        self._warn_if_idle()

    def _example(self, inputs: Sequence[Any]) -> Tensor:
        """A tensor in the model's dtype: the residual stream, else any input with a fraction."""
        if self.regions.residuals:
            stream: Tensor = self.regions.residuals[0].stream.meta["val"]
            return stream
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        return next((value for value in tensors if value.is_floating_point()), tensors[0])

    def placed(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs, each on the device where the graph takes it."""
        if not self.uploaded:
            return inputs
        return [upload(value, self.device) if i in self.uploaded else value for i, value in enumerate(inputs)]

    def settle(self, inputs: Sequence[Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Write back what the model changes in place; returns the model's own outputs."""
        count = len(self.mutated)
        for position, value in zip(self.mutated, outputs[:count], strict=True):
            inputs[position].copy_(value)
        return outputs[count:]

    def _plan(self) -> None:
        with self.record.timed("plan"):
            self.policy: Policy = policy_for(self.config, self.regions)
            self.plan: Plan = plan_step(self.graph, self.regions, self.policy.specs(), self.config)
            self.sessions = Sessions(self.config, self.plan.caches, self.device)
            self.timesteps = TimestepInput(len(self.regions.timesteps))

    def _cuda_graphs(self, arguments: Sequence[bool], waits: str | None) -> CudaGraphs | None:
        if not self.config.cuda_graphs or self.device.type != "cuda":
            return None
        compare = self._same_replay if self.config.validate else None
        return CudaGraphs(arguments, self.device, CudaRecorder(self.device), self.record, compare, waits)

    def _same_replay(self, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        same_outputs("replayed", found, wanted, self.config, self.record, token_dtypes(self.regions))

    def _warn_if_idle(self) -> None:
        if self.config.recipe == "none":
            return
        in_parts = self.record.partial or self.record.breaks  # then the break is warned of
        if not self.caching and not self.regions.skipped and not in_parts:
            self.record.warn(
                f"nothing was found that recipe {self.config.recipe!r} could cache (it needs MoE layers that it "
                "knows; the fora and stack recipes cache models without experts too): the model runs uncached"
            )
        if not self.caching:
            return
        if not self.regions.timesteps:
            self.caching, self.policy = False, Plain(self.config, self.regions)
            if self.record.partial:
                return  # the break that made it a part is warned of
            self.record.warn(
                "no timestep was found among the model's inputs, so steps and generations cannot be told apart: "
                "the model runs uncached. Pass the timestep as a tensor argument that reaches a sinusoidal embedding."
            )

    def _warn_of_waits(self) -> str | None:
        """On a device, say which layers' ops have to ask the host at every step, and why; returns one reason."""
        found = None
        for marker, body in self.regions.bodies.items():
            rows, parameters = ([node.meta["val"] for node in nodes] for nodes in (body.rows, body.parameters))
            reason = kernels.why_not(self.device, body.key, rows, parameters, body.experts)
            if reason is not None:
                found = f"the experts of {module_path(marker)} wait for the device at every step: {reason}"
                self.record.warn(found)
        return found

    # --- a step ---------------------------------------------------------------------------------------------

    def enter(self, inputs: Sequence[Any]) -> tuple[Position, Fresh]:
        """Where a call stands, and what it computes anew: everything, until it is known which input is the time."""
        marked = scope.current_time()
        known = self.timesteps.found is not None or marked is not None
        time = (marked,) if marked is not None else self._timestep(inputs)
        if time is None:
            self._warn_if_unclear()
        elif not known:
            self.sessions.reset()  # what came before was placed nowhere in time
        position = self.sessions.enter(time)
        if self.sessions.crowded:
            self.record.warn(
                f"caches are dropped before they are used, since more streams take turns than max_generations = "
                f"{self.config.max_generations} has room for: raise it, at the price of their memory"
            )
        if self.sessions.cut_short >= _RESTLESS:
            self.record.warn(
                f"time went back or jumped at almost every one of the last calls, which is taken for {_RESTLESS} new "
                "generations, so hardly anything is cached. If the sampler does that (churn, restarts), mark each "
                "generation: with moeca_compile.generation(): ..."
            )
        if time is not None and not known:
            position.generation.direction = self.timesteps.direction
        return position, self.sessions.due(position) if time is not None else Fresh(True, True)

    def _timestep(self, inputs: Sequence[Any]) -> Timestep | None:
        return self.timesteps.read([partial(self._value, inputs, node) for node in self.regions.timesteps])

    def _value(self, inputs: Sequence[Any], node: fx.Node) -> Timestep:
        """An input's numbers, read on the host: from an accelerator by one copy, for which the host waits."""
        value = inputs[self.placeholders.index(node)]
        return tuple(value.detach().flatten().tolist()) if isinstance(value, Tensor) else (float(value),)

    def _warn_if_unclear(self) -> None:
        if self.timesteps.unclear >= _UNCLEAR:
            places = (self.placeholders.index(node) for node in self.regions.timesteps)
            names = " and ".join(repr(self.names[place]) for place in places)
            self.record.warn(
                f"the inputs {names} are embedded like timesteps and change together, so it is not known which of "
                "them is the time, and nothing is cached. Let only one of them change from step to step, or mark "
                "calls with different values at one step with moeca_compile.stream(name)."
            )

    def clock(self, values: list[list[float]]) -> Tensor:
        """The clock of a step (policies.step.Step) on the model's device."""
        return upload(torch.tensor(values, dtype=torch.float32), self.device)

    def kind(self, fresh: Fresh, position: Position, inputs: Sequence[Any]) -> StepKind:
        """The step kind; a stream's first cache step finds out how large a capacity it needs."""
        if fresh.attention and fresh.experts:
            return StepKind()
        if fresh.experts or not self.regions.experts or self.config.family != "moeca":
            return StepKind(fresh.attention, fresh.experts)
        if position.stream.capacity is None:
            position.stream.capacity = self._first_capacity(fresh, position, inputs)
        return StepKind(fresh.attention, fresh.experts, position.stream.capacity)

    def _first_capacity(self, fresh: Fresh, position: Position, inputs: Sequence[Any]) -> int:
        if len(self.plan.capacities) == 1:
            return self.plan.capacities[0]
        probe = StepKind(fresh.attention, fresh.experts, self.plan.sizes[1])
        clock = self.clock(position.stream.clock(position.place))
        counts = self.eager(probe, inputs, position.stream.state, clock).counts
        return self._rung(self._needed(counts))

    def _needed(self, counts: Tensor | None) -> float:
        """Tokens of the main stream to recompute in a sample: the mean share, over samples and layers, of all."""
        if counts is None:
            return 0.0
        samples, tokens = self.plan.sizes
        total = sum(self.regions.layouts[layer.marker].tokens for layer in self.regions.experts)
        return float(counts[:, COUNTERS.index("needed")].sum()) / (samples * total) * tokens

    def _rung(self, needed: float) -> int:
        return next((c for c in self.plan.capacities if c >= needed), self.plan.capacities[-1])

    def promote(self, stream: Stream, counts: Tensor) -> None:
        """Give the next steps a larger capacity where much more was needed than this step had.

        Samples and layers that need more than the mean drop their lowest-ranked tokens. On an accelerator nothing
        waits for the counters, so there the first capacity stays.
        """
        if len(self.plan.capacities) > 1 and self.device.type == "cpu" and stream.capacity is not None:
            needed = self._needed(counts)
            if needed > _PROMOTED_ABOVE * stream.capacity:
                stream.capacity = self._rung(needed)

    def tally(self, kind: StepKind, counts: Tensor | None) -> None:
        """Count a step and what it counted; nothing is read from the device."""
        tally = self.tallies.setdefault(kind, Tally())
        tally.steps += 1
        if counts is not None:
            tally.counts = counts if tally.counts is None else tally.counts + counts

    def run(self, kind: StepKind, stream: Stream, inputs: Sequence[Any], clock: Tensor) -> StepResult:
        """Run a step on the stream's caches; the updates of the result are theirs to adopt."""
        program = self.program(kind, inputs, stream.state, clock)
        if self.graphs is None:
            return program(inputs, stream.state, clock)
        return self.graphs.run(kind, stream, program, inputs, clock)

    # --- programs ---------------------------------------------------------------------------------------------

    def function(self, kind: StepKind) -> StepFunction:
        """The step of this kind as an eager function; it may change some of the state in place."""
        return step_function(self.graph, self.regions, self.policy, kind)

    def eager(self, kind: StepKind, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor) -> StepResult:
        """Run a step without compilation on copies of the state."""
        with torch.no_grad(), undisturbed(self.device):
            copies = {name: tensor.clone() for name, tensor in state.items()}
            return self.function(kind)(inputs, copies, clock)

    def program(self, kind: StepKind, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor) -> StepFunction:
        """The compiled step of this kind, made and checked when first asked for."""
        if kind not in self.programs:
            try:
                self.programs[kind] = self._compiled(kind, inputs, state, clock)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self.record.warn(f"{kind.name} steps could not be compiled ({reason}), so they run without Inductor")
                self.programs[kind] = self.function(kind)
        return self.programs[kind]

    def _compiled(
        self, kind: StepKind, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor
    ) -> StepFunction:
        with self.record.timed("rewrite"):
            program = Program(self.function(kind), inputs, state, clock)
        with self.record.timed("lower"):
            # A step that recomputes nothing is a chain of sums: cut apart it took half as long again.
            program.lower(whole=not (kind.attention or kind.experts or kind.capacity))
        with self.record.timed("validate"):
            return self._checked(kind, program, inputs, state, clock)

    def _checked(
        self, kind: StepKind, program: Program, inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor
    ) -> StepFunction:
        """The program, or the same step run eagerly where what lowering made of it gives other outputs."""
        if not self.config.validate:
            return program
        eager = self.eager(kind, inputs, state, clock)
        with undisturbed(self.device):
            compiled = program(inputs, {name: tensor.clone() for name, tensor in state.items()}, clock)
        try:
            check, inside = "full" if kind.full else "cache", token_dtypes(self.regions)
            same_outputs(check, compiled.outputs, eager.outputs, self.config, self.record, inside)
        except ValidationError as error:
            self.record.warn(f"Inductor's code is wrong here ({error}), so {kind.name} steps run without it")
            return self.function(kind)
        return program

    def flops(self, kind: StepKind) -> float:
        """FLOPs of all steps of a kind so far; the cost is linear in the branches recomputed, so their mean does."""
        tally = self.tallies[kind]
        recomputed = 0.0
        if tally.counts is not None:
            sums = dict(zip(COUNTERS, tally.counts.sum(0).tolist(), strict=True))
            recomputed = sums["recomputed"] / sums["branches"]
        each = self.plan.flops(kind, kind.capacity / self.plan.sizes[1], recomputed)
        return tally.steps * each


def _place(inputs: Sequence[Any]) -> torch.device:
    """Where a model runs: on the accelerator that any of its inputs or weights lies on, else on the CPU."""
    devices = [value.device for value in inputs if isinstance(value, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
