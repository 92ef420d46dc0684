"""What each eval's summary.json says, as headlines and tables of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyctx.evals.plots import length_labels

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Section:
    """One result folder: a headline for each model, tables (header and rows), pictures."""

    title: str
    folder: Path
    headlines: dict[str, str]
    tables: list[Table]
    pictures: list[Path]
    settings: dict[str, Any]


def section_of(folder: Path, summary: dict[str, Any]) -> Section:
    """Raises ValueError for an eval that is not known, KeyError and the like for what lacks its parts."""
    name = summary.get("eval") or summary["settings"]["eval"]
    for known, read in READERS.items():
        if name.split()[0] == known:
            title, headlines, tables = read(name, summary)
            break
    else:
        raise ValueError(f"{folder} holds results of {name!r}; known are {', '.join(READERS)}")
    settings = {"settings": summary["settings"], "versions": summary["versions"]}
    return Section(title, folder, headlines, tables, sorted(folder.glob("*.png")), settings)


def _needle(name: str, summary: dict[str, Any]) -> tuple[str, dict[str, str], list[Table]]:
    label = summary["label"]
    lengths = summary["by_length"]
    header = ["length", *length_labels(map(int, lengths)).values(), "all"]
    scores = ["answered right", *(f"{share['mean']:.3f}" for share in lengths.values()), f"{summary['mean']:.3f}"]
    intervals = ["95% interval", *(_interval(share) for share in lengths.values()), _interval(summary)]
    return "Needle in a haystack", {label: _score(summary)}, [(header, [scores, intervals])]


def _perplexity(name: str, summary: dict[str, Any]) -> tuple[str, dict[str, str], list[Table]]:
    curves = summary["curves"]
    lengths = sorted({point["length"] for points in curves.values() for point in points})
    shown = length_labels(lengths)
    rows, headlines = [], {}
    for label, points in curves.items():
        by_length = {point["length"]: point for point in points}
        rows.append([label, *(_perplexity_of(by_length.get(length)) for length in lengths)])
        last = points[-1]
        headlines[label] = f"{_perplexity_of(last)} at {shown[last['length']]}"
    return "Perplexity", headlines, [(["model", *shown.values()], rows)]


def _scores(name: str, summary: dict[str, Any]) -> tuple[str, dict[str, str], list[Table]]:
    models = summary["models"]
    effective = summary.get("effective_length")
    headlines, tables = {}, []
    for label, model in models.items():
        headlines[label] = _score(model)
        if effective is not None:
            length = effective[label]
            reached = "none" if length is None else length_labels(map(int, model["average"]))[length]
            headlines[label] = f"effective length {reached} (at least {summary['threshold']:g})"
        if "average" in model:
            tables.append(_by_number(label, model))
    if not tables:
        rows = [[label, f"{model['mean']:.4f}", _interval(model)] for label, model in models.items()]
        tables.append((["model", "score", "95% interval"], rows))
    return (
        {"narrativeqa": "NarrativeQA", "ruler": "RULER"}.get(name, name.replace("longchat", "LongChat")),
        headlines,
        tables,
    )


def _by_number(label: str, model: dict[str, Any]) -> Table:
    """Kinds down, lengths (or lines, topics) across, averages last where there are several kinds."""
    [across] = [value for name, value in model.items() if name.startswith("by_") and name != "by_kind"]
    numbers = sorted(model["average"], key=int)
    rows = [
        [kind, *(f"{shares[number]['mean']:.3f}" if number in shares else "" for number in numbers)]
        for kind, shares in across.items()
    ]
    if len(rows) > 1:
        rows.append(["average", *(f"{model['average'][number]['mean']:.3f}" for number in numbers)])
    rows.append(["95% interval", *(_interval(model["average"][number]) for number in numbers)])
    return [label, *length_labels(map(int, numbers)).values()], rows


def _elo(name: str, summary: dict[str, Any]) -> tuple[str, dict[str, str], list[Table]]:
    header = ["model", "Elo", "95% interval", "Bradley-Terry", "95% interval", "won", "tied", "lost"]
    rows = [
        [
            entry["model"],
            f"{entry['elo']:.1f}",
            _range(entry["elo_interval"]),
            f"{entry['bradley_terry']:.1f}",
            _range(entry["bradley_terry_interval"]),
            *(str(entry[count]) for count in ("won", "tied", "lost")),
        ]
        for entry in summary["leaderboard"]
    ]
    headlines = {entry["model"]: f"{entry['elo']:.0f}" for entry in summary["leaderboard"]}
    return "Elo", headlines, [(header, rows)]


def _score(share: dict[str, Any]) -> str:
    return f"{share['mean']:.3f} ({_interval(share)})"


def _interval(share: dict[str, Any]) -> str:
    if share["interval"] is None:
        return ""
    low, high = share["interval"]
    return f"{low:.3f} to {high:.3f}"


def _range(interval: list[float]) -> str:
    return f"{interval[0]:.0f} to {interval[1]:.0f}"


def _perplexity_of(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    return "past the largest float" if point["perplexity"] is None else f"{point['perplexity']:.3f}"


READERS = {
    "needle": _needle,
    "perplexity": _perplexity,
    "longchat": _scores,
    "narrativeqa": _scores,
    "ruler": _scores,
    "elo": _elo,
}
