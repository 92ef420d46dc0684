"""What becomes of the rows of a needle run: CSV, heatmap, summary. Needs no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyctx.evals.plots import heatmaps, needle_panel
from easyctx.evals.results import read_rows, read_settings, versions_before, write_csv, write_json
from easyctx.evals.stats import wilson_interval

if TYPE_CHECKING:
    from easyctx.evals.needle_settings import Cell

ROWS_FILE, CSV_FILE, PICTURE_FILE, SUMMARY_FILE = "cells.jsonl", "needle.csv", "needle.png", "summary.json"
COMPARISON_FILE = "comparison.png"  # of several models, above their folders
VERIFY_FILE = "verify.json"  # of the shared computation against brute force
FILES = (ROWS_FILE, CSV_FILE, PICTURE_FILE, SUMMARY_FILE, VERIFY_FILE)
KEY = ("length", "depth", "sample")
COLUMNS = [
    "length", "depth", "sample", "correct", "substring", "token_accuracy", "logprob", "expected",
    "prediction", "needle_start", "seed", "prompt_hash", "seconds",
]  # fmt: skip


def report(folder: Path, label: str, versions: dict[str, str] | None, cells: Iterable[Cell] | None) -> None:
    """Writes needle.csv, needle.png and summary.json from cells.jsonl, and prints the mean.

    Covers `cells` (all rows of the folder for None). Without `versions` those of the last summary are kept.
    """
    rows = finished_rows(folder, cells)
    summary = summarise(rows)
    settings = read_settings(folder)
    write_csv(folder / CSV_FILE, rows, COLUMNS)
    write_json(
        folder / SUMMARY_FILE,
        {
            "label": label,
            **summary,
            "settings": settings,
            "versions": versions or versions_before(folder / SUMMARY_FILE),
        },
    )
    panel = needle_panel(shares_of(rows), _score(summary, settings))
    heatmaps(folder / PICTURE_FILE, [panel], title=f"Needle in a haystack: {label}", **axis_labels(rows))
    for length, share in summary["by_length"].items():
        low, high = share["interval"]
        print(f"{length:>9} tokens  {share['mean']:.3f}  ({low:.3f} to {high:.3f})")
    print(f"needle {label}: {_score(summary, settings)}; {folder / PICTURE_FILE}", flush=True)


def compare(path: Path, folders: dict[str, Path], cells: Iterable[Cell] | None) -> None:
    """One figure with the heatmap of each model; `folders` maps their labels to where their rows are."""
    rows = {label: finished_rows(folder, cells) for label, folder in folders.items()}
    panels = [
        needle_panel(shares_of(rows[label]), f"{label}: {_score(summarise(rows[label]), read_settings(folder))}")
        for label, folder in folders.items()
    ]
    heatmaps(path, panels, title="Needle in a haystack", **axis_labels(*rows.values()))
    print(f"comparison: {path}", flush=True)


def finished_rows(folder: Path, cells: Iterable[Cell] | None) -> list[dict[str, Any]]:
    """The rows of `cells` (all for None) in order. Raises ValueError where there are none."""
    rows = read_rows(folder / ROWS_FILE, KEY)
    if cells is not None:
        wanted = {(cell.length, cell.depth, cell.sample) for cell in cells}
        rows = [row for row in rows if tuple(row[name] for name in KEY) in wanted]
    if not rows:
        raise ValueError(f"{folder} holds no finished prompt to report")
    return sorted(rows, key=lambda row: tuple(row[name] for name in KEY))


def _score(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    low, high = summary["interval"]
    return (
        f"mean {summary['mean']:.3f}, 95% interval {low:.3f} to {high:.3f} "
        f"({summary['num_prompts']} prompts, {settings['digits']} digits{_kind(settings)})"
    )


def shares_of(rows: list[dict[str, Any]]) -> dict[tuple[int, float], float]:
    """The share of right answers by (length, depth)."""
    return {cell: mean([row["correct"] for row in group]) for cell, group in _cells(rows).items()}


def axis_labels(*panels: list[dict[str, Any]]) -> dict[str, str]:
    """Of a figure with the rows of these panels; says of how many prompts a cell is where that is the same in all."""
    num_samples = {max(row["sample"] for row in rows) + 1 for rows in panels}
    of = f" (of {max(num_samples)})" if len(num_samples) == 1 and num_samples != {1} else ""
    return {"xlabel": "prompt length (tokens)", "ylabel": "depth of the needle", "scale": f"answered right{of}"}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers with its Wilson interval: over all rows, by length and by depth."""
    return {
        **_share(rows),
        "token_accuracy": mean([row["token_accuracy"] for row in rows]),
        "logprob": mean([row["logprob"] for row in rows]),
        "by_length": {str(value): _share(group) for value, group in _groups(rows, "length").items()},
        "by_depth": {f"{value:g}": _share(group) for value, group in _groups(rows, "depth").items()},
        "seconds": round(sum(row["seconds"] for row in rows), 3),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _share(rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(row["correct"] for row in rows)
    return {
        "mean": right / len(rows),
        "interval": list(wilson_interval(right, len(rows))),
        "num_prompts": len(rows),
    }


def _groups(rows: list[dict[str, Any]], name: str) -> dict[float, list[dict[str, Any]]]:
    groups: dict[float, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[name]):
        groups.setdefault(row[name], []).append(row)
    return groups


def _cells(rows: list[dict[str, Any]]) -> dict[tuple[int, float], list[dict[str, Any]]]:
    cells: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["depth"]), []).append(row)
    return cells


def _kind(settings: dict[str, Any]) -> str:
    hidden = f", {settings['needles']} needles each" if settings.get("needles", 1) > 1 else ""
    hidden += f", {settings['distractors']} distractors" if settings["distractors"] else ""
    return hidden + (", depths of the longest length" if settings.get("depth_by") == "position" else "")
