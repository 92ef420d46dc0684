"""Writes `benchmarks/results/<benchmark>_<hardware>_<yyyymmdd>.json`: what was measured, where, with what, how."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "flash-attn-4", "triton")


def versions() -> dict[str, str]:
    """Python's, CUDA's and the packages' versions; a package that is not installed is left out."""
    import torch

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def hardware() -> str:
    """A short name of the machine, such as `2xNVIDIA-H200` or `cpu-2cores`."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x{torch.cuda.get_device_name().replace(' ', '-')}"
    return f"cpu-{os.cpu_count()}cores"


def write_results(benchmark: str, rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Write the rows with hardware, date, command and versions; returns the file."""
    today = datetime.date.today()
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}_{hardware()}_{today:%Y%m%d}.json"
    record = {
        "benchmark": benchmark,
        "hardware": hardware(),
        "date": today.isoformat(),
        "command": os.environ.get("EASYCTX_COMMAND") or shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "rows": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as aligned text, a column for each key of the first row."""
    keys = list(rows[0])
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
