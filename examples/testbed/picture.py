"""The picture: uncached samples, each policy's samples, and the difference, side by side."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from examples.testbed.compare import Policy, Row

SHOWN = 10
COLUMNS = 5
AMPLIFIED = 5  # differences are shown this many times larger


def mosaic(images: Tensor, empty: float) -> Tensor:
    """The first ten images [B, 1, H, W] in five columns, separated by lines of value ``empty``: one image [h, w]."""
    shown = torch.nn.functional.pad(images[:SHOWN, 0].float().cpu(), (0, 1, 0, 1), value=empty)
    missing = -len(shown) % COLUMNS
    shown = torch.cat([shown, torch.full((missing, *shown.shape[1:]), empty)])
    rows = shown.reshape(-1, COLUMNS, *shown.shape[1:])  # [rows, columns, H + 1, W + 1]
    return rows.permute(0, 2, 1, 3).reshape(rows.shape[0] * rows.shape[2], -1)[:-1, :-1]


def show_samples(axes: Axes, images: Tensor, title: str) -> None:
    axes.imshow(mosaic(images, empty=-1.0), cmap="gray", vmin=-1, vmax=1)
    axes.set_title(title, fontsize=9)


def show_difference(axes: Axes, images: Tensor, reference: Tensor) -> None:
    difference = AMPLIFIED * (images.clamp(-1, 1) - reference.clamp(-1, 1))
    axes.imshow(mosaic(difference, empty=0.0), cmap="RdBu", vmin=-2, vmax=2)


def save_picture(path: Path, reference: Policy, policies: list[Policy], rows: list[Row]) -> None:
    """Write a picture of every policy's first batch to ``path``; its suffix selects the format."""
    by_name = {row.policy: row for row in rows}
    figure, grid = plt.subplots(
        2, len(policies) + 1, figsize=(2.6 * (len(policies) + 1), 2.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_axis_off()
    show_samples(grid[0, 0], reference.images[0], f"uncached, {reference.steps} steps")
    grid[1, 0].text(0.5, 0.5, f"difference x {AMPLIFIED}", ha="center", va="center", fontsize=9)
    for column, policy in enumerate(policies, start=1):
        row = by_name[policy.name]
        title = f"{policy.name}\n{row.speedup_over_compile:.2f}x, {row.psnr:.1f} dB"
        show_samples(grid[0, column], policy.images[0], title)
        show_difference(grid[1, column], policy.images[0], reference.images[0])
    figure.savefig(path, dpi=150)
    plt.close(figure)
