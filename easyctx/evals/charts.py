"""Pictures of scores from 0 to 1: curves, bars, and a table in colours. See `plots.py` for the other evals'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyctx.evals.plots import label_lengths, pyplot, save_figure, tokens_label

Share = dict[str, Any]  # mean, interval (two numbers or None), num_answers


def score_curves(path: Path, curves: dict[str, dict[str, Share]], title: str, xlabel: str) -> None:
    """One line a model over numbers (the keys, as text), with the 95% interval as a band; always from 0 to 1."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    draw_scores(axes, curves, xlabel)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes.set_title(f"{_counted(curves)} answers a point; band: 95% interval", fontsize=9)
    save_figure(plt, figure, path)


def _counted(curves: dict[str, dict[str, Share]]) -> str:
    counts = {share["num_answers"] for points in curves.values() for share in points.values()}
    return f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"


def draw_scores(axes: Any, curves: dict[str, dict[str, Share]], xlabel: str) -> None:
    """The curves of `score_curves`, on axes of any figure."""
    for label, points in curves.items():
        numbers = sorted(map(int, points))
        shares = [points[str(number)] for number in numbers]
        (line,) = axes.plot(numbers, [share["mean"] for share in shares], marker="o", ms=4, label=label)
        banded = [
            (number, *share["interval"]) for number, share in zip(numbers, shares, strict=True) if share["interval"]
        ]
        axes.fill_between(
            [number for number, _, _ in banded],
            [low for _, low, _ in banded],
            [high for _, _, high in banded],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    label_lengths(axes, {int(number) for points in curves.values() for number in points})
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("score")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.8, edgecolor="none")


def score_bars(path: Path, shares: dict[str, Share], title: str, subtitle: str, xlabel: str) -> None:
    """One bar a model from 0 to 1, with its 95% interval."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 1.5 + 0.45 * len(shares)), layout="constrained")
    for row, share in enumerate(shares.values()):
        axes.barh(row, share["mean"], color="tab:blue", height=0.6)
        low, high = share["interval"] or (share["mean"], share["mean"])
        axes.plot([low, high], [row, row], color="black", linewidth=1.2)
        axes.text(max(high, share["mean"]) + 0.015, row, f"{share['mean']:.3f}", va="center", fontsize=9)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.set_xlabel(xlabel)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes.set_title(subtitle, fontsize=9)
    save_figure(plt, figure, path)


def position_steps(path: Path, bins: dict[str, list[dict[str, Any]]], title: str) -> None:
    """One line a model: the mean NLL (nats) of the predictions begin..end-1 of each bin."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for label, group in bins.items():
        edges = [group[0]["begin"], *(each["end"] for each in group)]
        axes.stairs([each["mean_nll"] for each in group], edges, label=label, baseline=None, linewidth=1.8)
    axes.xaxis.set_major_formatter(lambda tokens, _: tokens_label(tokens))
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("mean NLL (nats; lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.8, edgecolor="none")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    save_figure(plt, figure, path)


def leaderboard_chart(path: Path, board: list[dict[str, Any]], counted: str) -> None:
    """Elo and Bradley-Terry of each model with their 95% intervals, the best at the top."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.6, 1.7 + 0.5 * len(board)), layout="constrained")
    kinds = {"Elo": ("elo", "tab:blue", -0.12), "Bradley-Terry": ("bradley_terry", "tab:orange", 0.12)}
    for label, (name, colour, shift) in kinds.items():
        rows = [row + shift for row in range(len(board))]
        axes.hlines(rows, *zip(*(entry[f"{name}_interval"] for entry in board), strict=True), color=colour, linewidth=2)
        axes.plot([entry[name] for entry in board], rows, "o", color=colour, label=label)
    for row, entry in enumerate(board):
        axes.annotate(f"{entry['elo']:.0f}", (entry["elo"], row - 0.12), (0, 5), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(board)), [entry["model"] for entry in board])
    axes.set_ylim(len(board) - 0.4, -0.6)
    axes.set_xlabel("rating; line: 95% bootstrap interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(framealpha=0.8, edgecolor="none", loc="best", fontsize=8)
    figure.suptitle("Tournament of pairs", fontsize=11, fontweight="bold")
    axes.set_title(counted, fontsize=9)
    save_figure(plt, figure, path)
