"""The tables of docs/peers.md, between markers in text that is written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peer_sections.subjects import SUBJECTS
from bench.peer_sections.ways import COMPILED, EAGER, OURS

TIMES = {"over_compile_cpu": "processor time", "over_compile": "wall clock", "over_eager_cpu": "over eager"}
"""Speed-ups with their headings; those that no row has are left out."""
Row = Mapping[str, str]


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Put the table of each subject between its markers, where the page has them."""
    if not page.exists():
        return
    text = page.read_text()
    for name in SUBJECTS:
        of_subject = [row for row in rows if row["subject"] == name]
        if of_subject:
            text = with_table(text, name, table(of_subject))
    page.write_text(text)


def with_table(text: str, name: str, lines: str) -> str:
    mark = f"<!-- {name} -->"
    return re.sub(f"{mark}\n.*?{mark}", lambda _: f"{mark}\n{lines}\n{mark}", text, flags=re.DOTALL)


def table(rows: Sequence[Row]) -> str:
    times = [name for name in TIMES if any(row[name] for row in rows)]
    headings = ["way", "lines", "graphs, breaks, recompiles", "full steps", *(TIMES[name] for name in times)]
    headings += ["PSNR dB", "worst", "SSIM", "peak MiB"]
    ahead = {row["way"] for row in ahead_of_ours(rows)}
    lines = [_line(row, times, row["way"] in ahead) for row in rows]
    return "\n".join(["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|", *lines])


def ahead_of_ours(rows: Sequence[Row]) -> list[Row]:
    """Rows of other tools with no row of ours that is at least as fast and at least as near in the mean.

    None where ours has no rows to compare with.
    """
    ours = [(speed(row), float(row["psnr"])) for row in rows if row["tool"] == OURS and row["psnr"]]
    if not ours:
        return []
    theirs = [row for row in rows if row["tool"] not in (OURS, EAGER, COMPILED) and row["status"] == "ran"]
    return [row for row in theirs if not any(s >= speed(row) and near >= float(row["psnr"]) for s, near in ours)]


def speed(row: Row) -> float:
    """The speed-up in processor time; where that was not measured, what skipped steps would give at no cost."""
    return float(row["over_compile_cpu"] or float(row["steps"]) / float(row["full_steps"]))


def _line(row: Row, times: Sequence[str], ahead: bool) -> str:
    graphs = ", ".join((row["graphs"], row["breaks"], row["recompiles"])) if row["graphs"] not in ("", "0") else "-"
    if not row["psnr"]:
        failed = f"**{row['status']}**: {_cut(row['reason'])}"
        return f"| {row['way']} | {row['lines']} | - | {failed} |" + " |" * (4 + len(times))
    full = f"{row['full_steps'] or '-'} of {row['steps']}"
    idle = " (**idle**)" if row["status"] == "idle" else ""
    near = "equal" if float(row["psnr"]) >= 100 else f"{float(row['psnr']):.1f}"
    worst = "equal" if float(row["psnr_worst"]) >= 100 else f"{float(row['psnr_worst']):.1f}"
    cells = [
        row["way"] + idle + " †" * ahead,
        row["lines"],
        graphs,
        full,
        *(f"{float(row[name]):.2f}x" if row[name] else "-" for name in times),
        near,
        worst,
        f"{float(row['ssim']):.4f}",
        f"{float(row['peak_mib']):.1f}" if row["peak_mib"] else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def _cut(reason: str) -> str:
    return reason.replace("|", "/")[:200]
