"""What becomes of the rows of a perplexity run: CSV, figure, summary. Needs no model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from easyctx.evals.charts import position_steps
from easyctx.evals.perplexity_windows import LAST
from easyctx.evals.plots import perplexity_curves
from easyctx.evals.results import read_rows, read_settings, versions_before, write_csv, write_json
from easyctx.evals.stats import bootstrap_ratio, perplexity

ROWS_FILE, CSV_FILE, BINS_FILE = "documents.jsonl", "perplexity.csv", "perplexity_by_position.csv"
PICTURE_FILE, BINS_PICTURE_FILE, SUMMARY_FILE = "perplexity.png", "perplexity_by_position.png", "summary.json"
FILES = (ROWS_FILE, CSV_FILE, BINS_FILE, PICTURE_FILE, BINS_PICTURE_FILE, SUMMARY_FILE)
KEY = ("model", "document")


def report(folder: Path, versions: dict[str, str] | None, lengths: list[int] | None) -> None:
    """Writes the tables, the figure and the summary from documents.jsonl, and prints a line a model.

    Covers all models of the folder at `lengths` (all that there are for None).
    """
    rows = read_rows(folder / ROWS_FILE, KEY)
    if not rows:
        raise ValueError(f"{folder} holds no finished document to report")
    settings = read_settings(folder)
    by_model: dict[str, list[dict[str, Any]]] = {label: [] for label in settings["models"]}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    by_model = {label: group for label, group in by_model.items() if group}
    curves = {label: curve(group, lengths) for label, group in by_model.items()}
    bins = {label: by_position(group) for label, group in by_model.items()}
    write_csv(
        folder / CSV_FILE,
        [{"model": label, **point} for label, points in curves.items() for point in points],
        ["model", "length", "perplexity", "low", "high", "mean_nll", "num_tokens", "num_documents"],
    )
    write_csv(
        folder / BINS_FILE,
        [{"model": label, **each} for label, group in bins.items() for each in group],
        ["model", "begin", "end", "mean_nll", "num_tokens"],
    )
    summary = {
        "perplexity": {
            label: {str(point["length"]): point["perplexity"] for point in points} for label, points in curves.items()
        },
        "curves": curves,
        "by_position": bins,
        "settings": settings,
        "versions": versions or versions_before(folder / SUMMARY_FILE),
        "seconds": round(sum(row["seconds"] for row in rows), 3),
    }
    write_json(folder / SUMMARY_FILE, summary)
    perplexity_curves(folder / PICTURE_FILE, curves, "Perplexity by length", _subtitle(curves, settings))
    position_steps(folder / BINS_PICTURE_FILE, bins, "Loss by position")
    for label, points in curves.items():
        print(f"perplexity {label}: " + ", ".join(_point(point) for point in points))
    print(f"figure: {folder / PICTURE_FILE}", flush=True)


def curve(rows: list[dict[str, Any]], lengths: list[int] | None) -> list[dict[str, Any]]:
    """One point a length over the documents that reach it, with a bootstrap interval over documents."""
    sums: dict[int, list[float]] = {}
    counts: dict[int, list[int]] = {}
    for row in rows:
        for length, total, count in zip(row["reached"], row["nll_sum"], row["num_scored"], strict=True):
            if count and length in (lengths or row["lengths"]):
                sums.setdefault(length, []).append(total)
                counts.setdefault(length, []).append(count)
    points = []
    for length in sorted(sums):
        mean = sum(sums[length]) / sum(counts[length])
        interval = bootstrap_ratio(sums[length], counts[length])
        points.append(
            {
                "length": length,
                "perplexity": perplexity(mean),
                "low": perplexity(interval[0]) if interval else None,
                "high": perplexity(interval[1]) if interval else None,
                "mean_nll": mean,
                "num_tokens": sum(counts[length]),
                "num_documents": len(counts[length]),
            }
        )
    return points


def by_position(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean NLL (nats) of the predictions begin..end-1, over the documents with the longest set of bins."""
    edges = max((row["bin_edges"] for row in rows), key=lambda edges: edges[-1])
    widths = [end - begin for begin, end in pairwise(edges)]  # of rows from before tokens could go unscored
    same = [row for row in rows if row["bin_edges"] == edges]
    bins = []
    for number, (begin, end) in enumerate(pairwise(edges)):
        count = sum(row.get("bin_num_scored", widths)[number] for row in same)
        total = sum(row["bin_nll_sum"][number] for row in same)
        if count:
            bins.append({"begin": begin, "end": end, "mean_nll": total / count, "num_tokens": count})
    return bins


def _point(point: dict[str, Any]) -> str:
    value = "past the largest float" if point["perplexity"] is None else f"{point['perplexity']:.3f}"
    return f"{point['length']} tokens {value}"


def _subtitle(curves: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> str:
    numbers = {point["num_documents"] for points in curves.values() for point in points}
    shown = f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else f"{max(numbers)}"
    window = f", window moves by {settings['stride']}" if settings["stride"] else ""
    if settings.get("window") == LAST:
        window = f", the same last {settings['targets']:,} tokens of each"
    band = "; band: 95% bootstrap interval over documents" if max(numbers) > 1 else ""
    return f"{shown} document{'s' if max(numbers) > 1 else ''}{window}{band}"
