"""The leaderboard: table, picture, summary. Needs no judge."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

from easyctx.evals.charts import leaderboard_chart
from easyctx.evals.results import write_csv, write_json
from easyctx.evals.tournament.ratings import Battle, bootstrap, bradley_terry, elo

ROWS_FILE, CSV_FILE, PICTURE_FILE, SUMMARY_FILE = "verdicts.jsonl", "leaderboard.csv", "elo.png", "summary.json"
FILES = (ROWS_FILE, CSV_FILE, PICTURE_FILE, SUMMARY_FILE)
KEY = ("question", "first", "second")
COLUMNS = ["model", "elo", "elo_low", "elo_high", "bradley_terry", "bt_low", "bt_high", "won", "tied", "lost"]


def leaderboard(battles: list[Battle], models: list[str], k: float, start: float, seed: int) -> list[dict[str, Any]]:
    """One entry a model, the best first, with both ratings, their intervals and its results."""
    rate_elo = functools.partial(elo, k=k, start=start)
    rate_bt = functools.partial(bradley_terry, start=start)
    ratings, strengths = rate_elo(battles, models), rate_bt(battles, models)
    elo_intervals = bootstrap(rate_elo, battles, models, seed=seed)
    bt_intervals = bootstrap(rate_bt, battles, models, resamples=200, seed=seed)
    results = _results(battles)
    entries = [
        {
            "model": model,
            "elo": ratings[model],
            "elo_interval": list(elo_intervals[model]),
            "bradley_terry": strengths[model],
            "bradley_terry_interval": list(bt_intervals[model]),
            **{name: results[model, name] for name in ("won", "tied", "lost")},
        }
        for model in models
    ]
    return sorted(entries, key=lambda entry: -entry["elo"])


def _results(battles: list[Battle]) -> Counter[tuple[str, str]]:
    results: Counter[tuple[str, str]] = Counter()
    for battle in battles:
        names = {1.0: ("won", "lost"), 0.0: ("lost", "won")}.get(battle.score, ("tied", "tied"))
        results[battle.first, names[0]] += 1
        results[battle.second, names[1]] += 1
    return results


def report(folder: Path | None, board: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Prints the leaderboard; with a folder also writes leaderboard.csv, elo.png and summary.json.

    `summary` holds `num_battles` and `num_failed`, settings and versions.
    """
    width = max(len(entry["model"]) for entry in board)
    for place, entry in enumerate(board, start=1):
        low, high = entry["elo_interval"]
        results = f"{entry['won']} won, {entry['tied']} tied, {entry['lost']} lost"
        print(
            f"{place:>3}. {entry['model']:<{width}}  {entry['elo']:8.2f}  (95% interval {low:.0f} to {high:.0f};"
            f" Bradley-Terry {entry['bradley_terry']:.0f}; {results})"
        )
    counted = f"{summary['num_battles']} battles"
    if summary["num_failed"]:
        counted += f"; {summary['num_failed']} without a verdict that could be read are left out"
    print(counted, flush=True)
    if folder is None:
        return
    table = [
        {
            **entry,
            **dict(zip(("elo_low", "elo_high"), entry["elo_interval"], strict=True)),
            **dict(zip(("bt_low", "bt_high"), entry["bradley_terry_interval"], strict=True)),
        }
        for entry in board
    ]
    write_csv(folder / CSV_FILE, table, COLUMNS)
    write_json(folder / SUMMARY_FILE, {"eval": "elo", "leaderboard": board, **summary})
    leaderboard_chart(folder / PICTURE_FILE, board, counted)
    print(f"figure: {folder / PICTURE_FILE}", flush=True)
