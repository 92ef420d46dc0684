"""What lies where in the quickstart's output folder, and text files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

HELD_OUT = Path("held_out/topics.txt")
LONG_ROWS = Path("long_rows")
SHORT_MODEL = Path("short")
LONG_MODEL = Path("extended")
NEEDLE_BEFORE = Path("needle_before")
NEEDLE_AFTER = Path("needle_after")
PERPLEXITY = Path("perplexity")
SUMMARY = Path("summary.json")


def write_text(path: Path, text: str) -> None:
    """Writes beside the file and renames, so that no half-written file has the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
