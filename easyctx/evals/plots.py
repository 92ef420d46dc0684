"""Pictures of results. Nothing here reads a model, so they can be drawn again anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    render(figure, temporary)
    plt.close(figure)
    os.replace(temporary, path)


def render(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)


def length_labels(lengths: Iterable[int]) -> dict[int, str]:
    """A label for each of the lengths (or other counts) that are shown together.

    A K is 1,024 where that makes whole numbers of all that reach it, as in the names of models, and 1,000 otherwise:
    131072 is "128K" beside 65536, and "131K" beside 100000. What is a multiple of both is counted in thousands.
    """
    lengths = list(lengths)
    powers = not _are_multiples(lengths, 1000) and _are_multiples(lengths, 1024)
    return {length: tokens_label(length, 1024 if powers else 1000) for length in lengths}


def _are_multiples(lengths: list[int], thousand: int) -> bool:
    return not any(length % thousand for length in lengths if length >= thousand)


def tokens_label(tokens: float, thousand: int = 1000) -> str:
    """1000 -> "1K", 1500000 -> "1.5M", 256 -> "256"; with a thousand of 1024, 65536 -> "64K"."""
    if tokens < 10 * thousand and tokens % thousand:
        return f"{tokens:g}"
    for unit, name in ((thousand**2, "M"), (thousand, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:g}"


def label_lengths(axes: Any, lengths: set[int]) -> None:
    """These lengths (or other counts) as ticks, at most 12 of them, on a logarithmic axis."""
    ticks = sorted(lengths)
    if ticks[0] > 0:
        axes.set_xscale("log", base=2)
    step = max(1, (len(ticks) + 11) // 12)
    axes.set_xticks(ticks[::step], list(length_labels(ticks).values())[::step])
    axes.minorticks_off()


@dataclass(frozen=True)
class Panel:
    """A table in colours: a value from 0 (red) to 1 (green) by (row, column); cells that were not run stay grey.

    `written(value)` is the number in a cell.
    """

    title: str
    cells: dict[tuple[Any, Any], float]
    rows: dict[Any, str]  # row -> its label, from the top down
    columns: dict[Any, str]
    written: Callable[[float], str]


def needle_panel(shares: dict[tuple[int, float], float], title: str) -> Panel:
    """Lengths across, depths down. `shares` maps (length in tokens, depth in percent) to the share answered right."""
    return Panel(
        title,
        {(depth, length): share for (length, depth), share in shares.items()},
        {depth: f"{depth:g}%" for depth in sorted({depth for _, depth in shares})},
        length_labels(sorted({length for length, _ in shares})),
        lambda share: f"{share:.2f}".rstrip("0").rstrip("."),
    )


def heatmaps(path: Path, panels: list[Panel], *, title: str, xlabel: str, ylabel: str, scale: str) -> None:
    """One panel or several (narrow ones in two columns), all on one fixed scale from 0 to 1."""
    plt = pyplot()
    num_rows, num_columns = (max(len(getattr(panel, name)) for panel in panels) for name in ("rows", "columns"))
    across = 1 if num_columns > 12 else min(len(panels), 2)
    down = -(-len(panels) // across)
    width = min(max(6.0, 0.62 * num_columns + 2.6), 24.0 / across)
    height = min(max(3.6, 0.34 * num_rows + 1.8), 12.0)
    size = (across * width, down * height)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        image = _draw_panel(axes, panel, plt.get_cmap("RdYlGn").with_extremes(bad="0.85"))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.colorbar(image, ax=list(grid.flat), shrink=0.9 / down).set_label(scale)
    save_figure(plt, figure, path)


def _draw_panel(axes: Any, panel: Panel, colours: Any) -> Any:
    rows, columns = list(panel.rows), list(panel.columns)
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in panel.cells.items():
        grid[rows.index(row), columns.index(column)] = value
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    step = max(1, len(columns) // 32)
    axes.set_xticks(range(0, len(columns), step), list(panel.columns.values())[::step])
    if len(columns) > 12:
        axes.tick_params(axis="x", rotation=45)
    step = max(1, len(rows) // 24)
    axes.set_yticks(range(0, len(rows), step), list(panel.rows.values())[::step])
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.set_title(panel.title, fontsize=9)
    if len(columns) <= 24 and len(rows) <= 24:
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if value < 0.12 or value > 0.9 else "black"
                axes.text(column, row, panel.written(value), ha="center", va="center", fontsize=8, color=colour)
    return image


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
    label_lengths(axes, {point["length"] for points in curves.values() for point in points})
    if finite and max(finite) > 8 * min(finite):
        axes.set_yscale("log")
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.8, edgecolor="none")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes.set_title(subtitle, fontsize=9)
    save_figure(plt, figure, path)
