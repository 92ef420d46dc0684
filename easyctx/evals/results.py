"""What an eval leaves in its folder: rows that survive a killed run, and settings that must not change."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that no half file is seen under `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """The named columns of all rows; what a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends one JSON line a row and flushes it to the disk.

    A last line without its end is cut off first: the run that wrote it was killed.
    """
    lines = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, key: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, the newest of each `key`, without a last line that has no end (yet).

    The file stays as it is: a run may be writing it. Raises ValueError for a line that is no row.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    rows = {}
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n"), start=1):
        try:
            row = json.loads(line) if line else None
            if row is not None:
                rows[tuple(row[name] for name in key)] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is no row of this eval: {error!r}. Take the line out, another folder, "
                "or --overwrite"
            ) from error
    return list(rows.values())


def model_fingerprint(model: str) -> list[list[Any]]:
    """Name, size and time of each weights file of a local model folder; [] for a name on the hub."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files]


def open_output(folder: Path, settings: dict[str, Any], files: tuple[str, ...], overwrite: bool) -> None:
    """Makes `folder`, or resumes in it where it holds rows of the same settings.

    Raises ValueError naming what differs. `overwrite` first removes `files` (those of this eval) and
    nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file")
    settings = json.loads(json.dumps(settings))  # as it will be read back
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in (*files, SETTINGS_FILE):
            (folder / name).unlink(missing_ok=True)
    settings_file = folder / SETTINGS_FILE
    if settings_file.exists():
        before = json.loads(settings_file.read_text(encoding="utf-8"))
        _refuse_other_settings(folder, before, settings)
        # What one run knows and another does not (a further model) is kept.
        settings = {**before, **settings, "models": {**before.get("models", {}), **settings["models"]}}
    write_json(settings_file, settings)


def open_score_output(folder: Path) -> None:
    """Makes `folder` for the scores of others' predictions. Raises ValueError where a run has its results."""
    if folder.exists() and (not folder.is_dir() or (folder / SETTINGS_FILE).exists()):
        raise ValueError(f"--output {folder} is a file or holds a run's results; take another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _refuse_other_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [
        f"{name} ({before.get(name)!r} before, {now.get(name)!r} now)"
        for name in sorted({*before, *now} - {"models"})
        if before.get(name) != now.get(name)
    ]
    for label, fingerprint in now["models"].items():
        if before.get("models", {}).get(label, fingerprint) != fingerprint:
            differing.append(f"the weights of model {label}")
    if differing:
        raise ValueError(
            f"--output {folder} holds results of other settings: {'; '.join(differing)}. "
            "Take another folder, or --overwrite"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that `open_output` left. Raises ValueError where there are none."""
    file = folder / SETTINGS_FILE
    if not file.exists():
        raise ValueError(f"--output {folder} holds no results to plot: {file.name} is missing")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def versions_before(summary_file: Path) -> dict[str, str]:
    """The versions of the last summary, {} where there is none: a figure that is drawn again keeps them."""
    if not summary_file.exists():
        return {}
    return dict(json.loads(summary_file.read_text(encoding="utf-8"))["versions"])
