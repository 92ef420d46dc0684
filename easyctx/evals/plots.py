"""Pictures of results. Nothing here reads a model, so they can be drawn again anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(plt: Any, figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)


def tokens_label(tokens: float) -> str:
    """1000 -> "1K", 1500000 -> "1.5M", 256 -> "256"."""
    if tokens < 10_000 and tokens % 1000:
        return f"{tokens:g}"
    for unit, name in ((1_000_000, "M"), (1_000, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:g}"


def needle_heatmap(
    path: Path, shares: dict[tuple[int, float], float], title: str, subtitle: str, num_samples: int
) -> None:
    """Lengths across, depths down, colours always from 0 (red) to 1 (green); cells not run stay grey.

    `shares` maps (length in tokens, depth in percent) to the share of samples answered right.
    """
    plt = pyplot()
    lengths = sorted({length for length, _ in shares})
    depths = sorted({depth for _, depth in shares})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), share in shares.items():
        grid[depths.index(depth), lengths.index(length)] = share
    width = min(max(6.0, 0.62 * len(lengths) + 2.6), 24.0)
    height = min(max(3.6, 0.34 * len(depths) + 1.8), 12.0)
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    colours = plt.get_cmap("RdYlGn").with_extremes(bad="0.85")
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    step = max(1, len(lengths) // 32)
    axes.set_xticks(range(0, len(lengths), step), [tokens_label(n) for n in lengths[::step]])
    if len(lengths) > 12:
        axes.tick_params(axis="x", rotation=45)
    step = max(1, len(depths) // 24)
    axes.set_yticks(range(0, len(depths), step), [f"{depth:g}%" for depth in depths[::step]])
    axes.set_xticks(np.arange(len(lengths) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("depth of the needle")
    if len(lengths) <= 24 and len(depths) <= 24:
        _write_shares(axes, grid)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes.set_title(subtitle, fontsize=9)
    scale = figure.colorbar(image, ax=axes, shrink=0.9)
    scale.set_label("answered right" + (f" (of {num_samples})" if num_samples > 1 else ""))
    save_figure(plt, figure, path)


def _write_shares(axes: Any, grid: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(grid):
        if not np.isnan(share):
            text = f"{share:.2f}".rstrip("0").rstrip(".")
            colour = "white" if share < 0.12 or share > 0.9 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def perplexity_curves(path: Path, curves: dict[str, list[dict[str, Any]]], title: str, subtitle: str) -> None:
    """One line a model over lengths on a logarithmic axis, with the bootstrap interval as a band.

    `curves` maps a label to points with `length`, `perplexity` (None past the largest float), `low`, `high`.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    finite = [point["perplexity"] for points in curves.values() for point in points if point["perplexity"] is not None]
    for label, points in curves.items():
        shown = [point for point in points if point["perplexity"] is not None]
        lengths = [point["length"] for point in shown]
        (line,) = axes.plot(lengths, [point["perplexity"] for point in shown], marker="o", ms=4, label=label)
        banded = [point for point in shown if point["low"] is not None and point["high"] is not None]
        axes.fill_between(
            [point["length"] for point in banded],
            [point["low"] for point in banded],
            [point["high"] for point in banded],
            color=line.get_color(),
            alpha=0.18,
            linewidth=0,
        )
    ticks = sorted({point["length"] for points in curves.values() for point in points})
    axes.set_xscale("log", base=2)
    step = max(1, (len(ticks) + 11) // 12)
    axes.set_xticks(ticks[::step], [tokens_label(tick) for tick in ticks[::step]])
    axes.minorticks_off()
    if finite and max(finite) > 8 * min(finite):
        axes.set_yscale("log")
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes.set_title(subtitle, fontsize=9)
    save_figure(plt, figure, path)
