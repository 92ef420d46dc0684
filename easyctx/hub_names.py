"""Hub names and local paths look alike: `data/64k` may be either, and the hub is slow to say that it has none."""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FOLDERS = ("checkpoints", "data", "datasets", "models", "output", "outputs", "runs")
SUFFIXES = (".arrow", ".bin", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".pt", ".safetensors", ".txt", ".yaml")


def why_no_hub_name(name: str) -> str | None:
    """Why a name that is no file or folder here is not looked for on the hub either; None where it may be there."""
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        return "it is no hub name (owner/name) either"
    first, last = name.split("/")
    if Path(first).is_dir():
        inside = sorted(path.name for path in Path(first).iterdir() if not path.name.startswith("."))
        shown = ", ".join(inside[:8]) + (", …" if len(inside) > 8 else "")
        return f"the folder {first} here holds {shown or 'nothing'} (the hub is asked where there is no folder {first})"
    if first in FOLDERS:
        return f"{first}/ is taken for a folder, not for an owner on the hub"
    if last.lower().endswith(SUFFIXES):
        return f"{last} is taken for a file, not for a name on the hub"
    return None
