"""The tables of docs/peers.md, between markers in text that is written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peer_sections.subjects import SUBJECTS

HEAD = (
    "| way | lines | graphs, breaks, recompiles | full steps | processor time | wall clock | PSNR dB | worst | SSIM"
    " | peak MiB |\n|---|---|---|---|---|---|---|---|---|---|"
)
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
    return "\n".join([HEAD, *map(_line, rows)])


def _line(row: Row) -> str:
    graphs = ", ".join((row["graphs"], row["breaks"], row["recompiles"]))
    if not row["psnr"]:
        return f"| {row['way']} | {row['lines']} | - | - | **{row['status']}**: {_cut(row['reason'])} |" + " |" * 5
    full = f"{row['full_steps'] or '-'} of {row['steps']}"
    idle = " (**idle**)" if row["status"] == "idle" else ""
    near = "equal" if float(row["psnr"]) >= 100 else f"{float(row['psnr']):.1f}"
    worst = "equal" if float(row["psnr_worst"]) >= 100 else f"{float(row['psnr_worst']):.1f}"
    cells = [
        row["way"] + idle,
        row["lines"],
        graphs,
        full,
        f"{float(row['over_compile_cpu']):.2f}x",
        f"{float(row['over_compile']):.2f}x",
        near,
        worst,
        f"{float(row['ssim']):.4f}",
        f"{float(row['peak_mib']):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _cut(reason: str) -> str:
    return reason.replace("|", "/")[:160]
