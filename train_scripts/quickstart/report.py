"""The quickstart's last step: one small table of what the evals found, and summary.json.

python -m train_scripts.quickstart.report --output DIR --seconds 250
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from train_scripts.quickstart import folders
from train_scripts.quickstart.folders import write_text

Scores = dict[str, float]  # length (as JSON writes it) to value
HEADER = ("length", "needle before", "needle after", "perplexity before", "perplexity after")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def needle_scores(folder: Path) -> Scores:
    """Share of right answers by length, over all depths and samples."""
    by_length = read_json(folder / "summary.json")["by_length"]
    return {length: share["mean"] for length, share in by_length.items()}


def summarise(output: Path, seconds: float) -> dict[str, Any]:
    """What summary.json holds. `seconds` is the time since the installs."""
    perplexity = read_json(output / folders.PERPLEXITY / "summary.json")
    return {
        "needle_before": needle_scores(output / folders.NEEDLE_BEFORE),
        "needle_after": needle_scores(output / folders.NEEDLE_AFTER),
        "perplexity_before": perplexity["perplexity"]["before"],
        "perplexity_after": perplexity["perplexity"]["after"],
        "seconds": seconds,
        "versions": perplexity["versions"],
    }


def table(summary: dict[str, Any]) -> str:
    """The scores by length as aligned text."""
    columns = [summary[name.replace(" ", "_")] for name in HEADER[1:]]
    lengths = sorted({int(length) for column in columns for length in column})
    rows: list[tuple[str, ...]] = [HEADER]
    for length in lengths:
        needles = [_cell(column.get(str(length)), ".0%") for column in columns[:2]]
        perplexities = [_cell(column.get(str(length)), ".2f") for column in columns[2:]]
        rows.append((str(length), *needles, *perplexities))
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEADER))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="since the installs")
    args = parser.parse_args()
    summary = summarise(args.output, args.seconds)
    write_text(args.output / folders.SUMMARY, json.dumps(summary, indent=2) + "\n")
    print(f"\n{table(summary)}\n")
    print("needle: share of numbers found, over 11 depths; perplexity: a byte, on text that no training saw")
    for picture in (
        folders.NEEDLE_BEFORE / "needle.png",
        folders.NEEDLE_AFTER / "needle.png",
        folders.PERPLEXITY / "perplexity.png",
    ):
        print(f"picture: {args.output / picture}")
    print(f"summary: {args.output / folders.SUMMARY}\nquickstart: {args.seconds:.0f} s after the installs")


if __name__ == "__main__":
    main()
