"""What becomes of the rows of generated answers: table, picture, summary. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyctx.evals.results import read_rows, read_settings, versions_before, write_csv, write_json
from easyctx.evals.stats import average_interval, score_interval

ROWS_FILE, CSV_FILE, PICTURE_FILE, SUMMARY_FILE = "answers.jsonl", "answers.csv", "scores.png", "summary.json"
FILES = (ROWS_FILE, CSV_FILE, PICTURE_FILE, SUMMARY_FILE)
KEY = ("model", "item")
COLUMNS = ["score", "references", "prediction", "stopped_by", "prompt_tokens", "prompt_hash", "seconds"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class View:
    """How the rows of one eval are summed up and drawn.

    Scores are averaged by the column `across` (a number: tokens, lines; None for none) for each kind of
    question. `draw(path, summary)` makes the picture; `extra(summary)` adds to the summary, `notes(summary)` to what
    is printed; `save(folder, rows)` writes further files.
    """

    name: str
    across: str | None
    draw: Callable[[Path, dict[str, Any]], None]
    extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda summary: {}
    notes: Callable[[dict[str, Any]], list[str]] = lambda summary: []
    save: Callable[[Path, Rows], None] = lambda folder, rows: None


def report_folder(folder: Path, view: View, versions: dict[str, str] | None, items: set[str] | None) -> None:
    """Reports on the rows of a run: all of them, or those of `items`."""
    rows = [row for row in read_rows(folder / ROWS_FILE, KEY) if items is None or row["item"] in items]
    if not rows:
        raise ValueError(f"--output {folder} holds no finished answer to report")
    report(rows, view, folder, read_settings(folder), versions or versions_before(folder / SUMMARY_FILE))


def report(rows: Rows, view: View, folder: Path | None, settings: dict[str, Any], versions: dict[str, str]) -> None:
    """Prints the scores; with a folder also writes answers.csv, scores.png and summary.json."""
    summary = {**summarise(rows, view.across), "settings": settings, "versions": versions}
    summary |= view.extra(summary)
    print("\n".join(_lines(view.name, summary) + view.notes(summary)), flush=True)
    if folder is None:
        return
    labels = [name for name in rows[0] if name not in COLUMNS]
    table = [{**row, "references": json.dumps(row["references"], ensure_ascii=False)} for row in rows]
    write_csv(folder / CSV_FILE, table, [*labels, *COLUMNS])
    write_json(folder / SUMMARY_FILE, {"eval": view.name, **summary})
    view.save(folder, rows)
    view.draw(folder / PICTURE_FILE, summary)
    print(f"figure: {folder / PICTURE_FILE}", flush=True)


def summarise(rows: Rows, across: str | None) -> dict[str, Any]:
    """Mean scores with intervals: of each model over all rows, by kind, and by kind and `across`."""
    models: dict[str, Any] = {}
    for label, group in _groups(rows, "model").items():
        models[label] = _share(group)
        models[label]["by_kind"] = {kind: _share(part) for kind, part in _groups(group, "kind").items()}
        models[label]["seconds"] = round(sum(row.get("seconds", 0.0) for row in group), 3)
        if across:
            models[label]["by_" + across] = {
                kind: {str(value): _share(each) for value, each in _groups(part, across, in_order=True).items()}
                for kind, part in _groups(group, "kind").items()
            }
            models[label]["average"] = {
                str(value): _average(each) for value, each in _groups(group, across, in_order=True).items()
            }
    return {"models": models}


def _share(rows: Rows) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    interval = score_interval(scores)
    return {
        "mean": sum(scores) / len(scores),
        "interval": list(interval) if interval else None,
        "num_answers": len(scores),
    }


def _average(rows: Rows) -> dict[str, Any]:
    """The mean over kinds of each kind's mean score."""
    kinds = [[row["score"] for row in part] for part in _groups(rows, "kind").values()]
    interval = average_interval(kinds)
    return {
        "mean": sum(sum(scores) / len(scores) for scores in kinds) / len(kinds),
        "interval": list(interval) if interval else None,
        "num_answers": len(rows),
        "num_kinds": len(kinds),
    }


def _groups(rows: Rows, name: str, in_order: bool = False) -> dict[Any, Rows]:
    groups: dict[Any, Rows] = {}
    for row in sorted(rows, key=lambda row: row[name]) if in_order else rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _lines(name: str, summary: dict[str, Any]) -> list[str]:
    lines = []
    for label, model in summary["models"].items():
        lines.append(f"{name} {label}: {in_words(model)}, {model['num_answers']} answers")
        if len(model["by_kind"]) > 1:
            lines += [f"  {kind:<16} {in_words(share)}" for kind, share in model["by_kind"].items()]
        lines += [f"  {value:>16} {in_words(share)}" for value, share in model.get("average", {}).items()]
    return lines


def in_words(share: dict[str, Any]) -> str:
    """ "0.850, 95% interval 0.700 to 0.930"."""
    if share["interval"] is None:
        return f"{share['mean']:.4f}"
    low, high = share["interval"]
    return f"{share['mean']:.4f}, 95% interval {low:.3f} to {high:.3f}"
