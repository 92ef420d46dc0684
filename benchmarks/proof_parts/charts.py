"""Pictures of a proof: each in two panels, the models of the stages and the controls beside the last of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyctx.evals.charts import draw_scores
from easyctx.evals.plots import label_lengths, pyplot, save_figure

Curves = dict[str, Any]  # by the model's label
LENGTH = "length (tokens)"
PERPLEXITIES = (40, 50, 60, 80, 100, 150, 200, 400)


def draw_needles(path: Path, panels: dict[str, Curves]) -> None:
    _draw(path, panels, _needles, "Needle in a haystack: share found, over all depths (band: 95% interval)")


def draw_perplexities(path: Path, panels: dict[str, Curves]) -> None:
    title = "Perplexity of the same last tokens of held-out novels, behind more and more of them"
    _draw(path, panels, _perplexities, title)


def _draw(path: Path, panels: dict[str, Curves], draw: Callable[[Any, Curves], None], title: str) -> None:
    plt = pyplot()
    size = (5.4 * len(panels), 4.2)
    figure, grid = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    colours = plt.get_cmap("tab10").colors
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    for axes, (what, curves) in zip(grid.flat, panels.items(), strict=True):
        axes.set_prop_cycle(color=[colours[labels.index(label)] for label in curves])  # a model's in every panel
        draw(axes, curves)
        axes.set_title(what, fontsize=9)
    for axes in grid.flat[1:]:
        axes.set_ylabel("")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    save_figure(plt, figure, path)


def _needles(axes: Any, curves: Curves) -> None:
    draw_scores(axes, curves, LENGTH)
    axes.set_ylabel("needles found")


def _perplexities(axes: Any, curves: Curves) -> None:
    """Without intervals: those of the mean over texts are far wider than what models differ by on the same texts."""
    plt = pyplot()
    for label, points in curves.items():
        shown = [point for point in points if point["perplexity"] is not None]
        axes.plot([each["length"] for each in shown], [each["perplexity"] for each in shown], "o-", ms=4, label=label)
    label_lengths(axes, {point["length"] for points in curves.values() for point in points})
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(plt.FixedLocator(PERPLEXITIES))  # unlike set_yticks it leaves the limits be
    axes.yaxis.set_major_formatter(plt.ScalarFormatter())
    axes.yaxis.set_minor_locator(plt.NullLocator())
    axes.set_xlabel(LENGTH)
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.8, edgecolor="none", loc="upper left")


def draw_losses(path: Path, one: list[float], two: list[float]) -> None:
    plt = pyplot()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.2, 5.2), layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    steps = range(1, len(one) + 1)
    above.plot(steps, one, label="one process", linewidth=4, alpha=0.4)
    above.plot(range(1, len(two) + 1), two, label="zigzag ring of two", linewidth=1.2, color="black")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    differences = [abs(a - b) for a, b in zip(one, two, strict=False)]
    below.plot(range(1, len(differences) + 1), differences, marker="o", ms=3)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.suptitle("The same extension with the sequence on one and on two processes", fontsize=11, fontweight="bold")
    save_figure(plt, figure, path)
