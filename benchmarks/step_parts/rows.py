"""The rows of benchmarks/train_step.py: a file that its children add to, and whether they agree."""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

ROWS = "rows.jsonl"
Row = dict[str, Any]
# In bfloat16 kernels differ by rounding alone; the gradient norm sums over all weights, the loss over all tokens.
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-3, 2e-2


def read_rows(folder: Path) -> list[Row]:
    """The rows of all methods so far."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    return []


def add_row(folder: Path, row: Row) -> None:
    with (folder / ROWS).open("a") as file:
        file.write(json.dumps(row) + "\n")


def failed_rows(args: argparse.Namespace, method: str, done: list[Row], failure: Row) -> list[Row]:
    """A row for each length that a method has none of, after its processes ended."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    have = [row["seq_length"] for row in done if row["asked"] == method]
    rows = []
    for length in (length for length in args.seq_lengths if length not in have):
        message, at = failure["message"], failure["seq_length"]
        if at is not None and at < length:
            message = f"not run, since {at} tokens failed: {message}"
        row = {"method": method, "model": args.model, "layers": args.layers, "gpus": world, "seq_length": length}
        rows.append(row | {"asked": method, "error_message": message})
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """The rows, those whose loss or gradient norm are not those of the first of their length saying so."""
    first: dict[int, Row] = {}
    found = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in ("disagrees", "asked")}
        found.append(row)
        if "error_message" in row:
            continue
        want = first.setdefault(row["seq_length"], row)
        wrong = [
            f"{name} {row[name]:.6g}, that of {want['method']} is {want[name]:.6g}"
            for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE))
            # Written so that NaN is wrong.
            if not abs(row[name] - want[name]) <= tolerance * abs(want[name])
        ]
        if wrong:
            row["disagrees"] = "; ".join(wrong)
    return found
