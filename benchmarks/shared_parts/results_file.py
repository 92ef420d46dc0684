"""Writes `benchmarks/results/<benchmark>_<hardware>_<yyyymmdd>.json`: what was measured, where, with what, how."""

import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyctx.environment import hardware, versions

RESULTS = Path(__file__).parents[1] / "results"


def write_results(
    benchmark: str,
    rows: list[dict[str, Any]],
    folder: Path | None = None,
    measured_on: str | None = None,
    measured_with: dict[str, str] | None = None,
) -> Path:
    """Write the rows with hardware, date, command and versions; returns the file.

    measured_on, measured_with: hardware and versions, where the rows come from another machine than this.
    """
    today = datetime.date.today()
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    machine = measured_on or hardware()
    path = folder / f"{benchmark}_{machine}_{today:%Y%m%d}.json"
    record = {
        "benchmark": benchmark,
        "hardware": machine,
        "date": today.isoformat(),
        "command": os.environ.get("EASYCTX_COMMAND") or this_command(),
        "versions": measured_with or versions(),
        "rows": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def this_command() -> str:
    """The command line that this process was started with, and what launched it."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = "python"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by `accelerate launch`, which does not tell its configuration
        launcher = f"accelerate launch --config_file … --num_processes {processes}"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc-per-node {processes}"
    return f"{launcher} {shlex.join(sys.argv)}"


def print_table(rows: list[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """The rows as aligned text, with these columns, or one for each key of the first row."""
    keys = list(columns or rows[0])
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
