"""What is captured of each kind of code that DiT-MoE models are made of, and how exact: writes docs/code-shapes.md.

python -m bench.code_shapes
python -m bench.code_shapes --group Attention --out elsewhere.md

In the repository only: the kinds are those of tests/variants/shapes.py, written as public models write them, each in
a model of one or two blocks that is plain otherwise. They are checked as bench.coverage checks models: the numbers of
a full step, and of a cache step that recomputes everything through the caches, against the eager model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.coverage import TIMESTEPS, Row, Subject, look_at, moved
from examples.machine import environment
from examples.testbed.arguments import whole_number
from tests.variants.blocks import make_inputs
from tests.variants.shapes import Shape, shapes

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "code-shapes.md"


def subject_of(shape: Shape) -> Subject:
    """The shape's model, called at timesteps as it takes them."""

    def make() -> tuple[nn.Module, Callable[[Callable[..., Any], float], Tensor]]:
        x, others = make_inputs(shape.how)

        def run(call: Callable[..., Any], at: float) -> Tensor:
            return call(moved(x, at), _time(shape, at), *others)

        return shape.make(), run

    return Subject(shape.what, make)


def _time(shape: Shape, at: float) -> Tensor:
    if shape.how.timestep == "long":
        return torch.full((shape.how.batch,), int(at))
    time = at / max(TIMESTEPS)
    return torch.tensor(time) if shape.how.timestep == "scalar" else torch.full((shape.how.batch,), time)


_HEAD = """# Code shapes

What is captured of each kind of code that DiT-MoE models are made of, as public models write them. No model is known
by its name: each of these stands in a small model that is plain otherwise. Written by `python -m bench.code_shapes`;
nothing here is written by hand. Measured with {versions}.

- *Captured*: MoE layers and attentions that are cached, of those in the model, in one graph if nothing else is said.
- *Full*: greatest error of a full step, relative to the output's scale, against the model in eager.
  *Recomputed*: that of the next step, with everything recomputed through the caches.
- Steps run as eager functions, without Inductor; weights are random, in float32 if nothing else is said.

What is left as it is, and how to find out why: [What capture needs](capture.md).
"""


def document(rows: Sequence[tuple[Shape, Row]], where: dict[str, Any]) -> str:
    """The page as Markdown: a table a group, and what was not captured."""
    lines = [_HEAD.format(versions=", ".join(f"{name} {value}" for name, value in where.items()))]
    for group, members in groupby(rows, key=lambda row: row[0].group):
        lines += [f"## {group}\n", "| kind | captured | full | recomputed |", "|---|---|---|---|"]
        lines += [_line(row) for _, row in members]
        lines.append("")
    left = [f"- {row.name}: {reason}" for _, row in rows for reason in _reasons(row)]
    return "\n".join([*lines, "## What is not, and why\n", *(left or ["Nothing."])]) + "\n"


def _line(row: Row) -> str:
    kind = row.name.replace("|", "\\|")
    return f"| {kind} | " + " | ".join(["failed", "-", "-"] if row.failure else _cells(row)) + " |"


def _cells(row: Row) -> list[str]:
    captured = "{} of {} layers, {} of {} attentions".format(*row.experts, *row.attentions)
    graphs = "" if row.graphs == 1 else f", {row.graphs} graphs"
    return [captured + graphs, f"{row.full:.1e}", f"{row.recomputed:.1e}"]


def _reasons(row: Row) -> list[str]:
    return [row.failure] if row.failure else [*row.breaks, *row.skipped]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    groups = list(dict.fromkeys(shape.group for shape in shapes()))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--group", action="append", choices=groups, help="may be given several times (all)")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of torch (1)")
    parser.add_argument("--out", type=Path, default=DOCUMENT, metavar="MD", help=f"({DOCUMENT})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for shape in shapes():
        if not args.group or shape.group in args.group:
            rows.append((shape, look_at(subject_of(shape))))
            print(_line(rows[-1][1]), flush=True)
    args.out.write_text(document(rows, environment(torch.device("cpu"), torch.float32)))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
