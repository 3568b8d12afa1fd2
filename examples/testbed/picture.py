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


def mosaic(images: Tensor, empty: float, columns: int = COLUMNS) -> Tensor:
    """The images [B, C, H, W] in columns, separated by lines of value ``empty``: one image [h, w, C].

    It is [h, w] where there is one channel.
    """
    shown = torch.nn.functional.pad(images.float().cpu(), (0, 1, 0, 1), value=empty)
    missing = -len(shown) % columns
    shown = torch.cat([shown, torch.full((missing, *shown.shape[1:]), empty)])
    rows = shown.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # [rows, H + 1, columns, W + 1, C]
    return rows.flatten(2, 3).flatten(0, 1)[:-1, :-1].squeeze(-1)


def show_samples(axes: Axes, images: Tensor, title: str, columns: int = COLUMNS) -> None:
    shown = mosaic((images.clamp(-1, 1) + 1) / 2, empty=0.0, columns=columns)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=9)


def show_difference(axes: Axes, images: Tensor, reference: Tensor) -> None:
    """No difference is white, and in color middle gray."""
    difference = AMPLIFIED * (images.clamp(-1, 1) - reference.clamp(-1, 1))
    shown = mosaic((difference.clamp(-2, 2) + 2) / 4, empty=0.5)
    axes.imshow(shown, cmap="RdBu", vmin=0, vmax=1)


def save_picture(path: Path, reference: Policy, policies: list[Policy], rows: list[Row]) -> None:
    """Write a picture of every policy's first batch to ``path``; its suffix selects the format."""
    by_name = {row.policy: row for row in rows}
    figure, grid = plt.subplots(
        2, len(policies) + 1, figsize=(2.6 * (len(policies) + 1), 2.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_axis_off()
    show_samples(grid[0, 0], reference.images[0][:SHOWN], f"uncached, {reference.steps} steps")
    grid[1, 0].text(0.5, 0.5, f"difference x {AMPLIFIED}", ha="center", va="center", fontsize=9)
    for column, policy in enumerate(policies, start=1):
        row = by_name[policy.name]
        title = f"{policy.name}\n{row.speedup_over_compile:.2f}x, {row.psnr:.1f} dB"
        show_samples(grid[0, column], policy.images[0][:SHOWN], title)
        show_difference(grid[1, column], policy.images[0][:SHOWN], reference.images[0][:SHOWN])
    figure.savefig(path, dpi=150)
    plt.close(figure)
