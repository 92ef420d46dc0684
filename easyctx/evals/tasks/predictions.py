"""Predictions that others made, from the public formats: for scoring without a model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyctx.evals.textio import read_jsonl, read_text

PREDICTION_FIELDS = ("prediction", "pred", "output")


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in words, object) of each line of JSONL or CSV, each entry of a JSON list, or each id of a JSON object.

    An object of texts by id, the form of ZeroSCROLLS, gives {"id": ..., "prediction": ...} for each.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file")
    if file.suffix == ".csv":
        table = csv.DictReader(io.StringIO(read_text(file), newline=""))
        yield from ((f"{file} row {number}", _cells(row)) for number, row in enumerate(table, start=1))
        return
    if file.suffix != ".json":
        yield from ((f"{file} line {number}", row) for number, row in read_jsonl(file))
        return
    try:
        value = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        value = [{"id": name, "prediction": text} for name, text in value.items()]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{file} is neither a list of objects nor an object of texts by id")
    yield from ((f"{file} entry {number}", row) for number, row in enumerate(value, start=1))


def _cells(row: dict[str, str | None]) -> dict[str, Any]:
    """A row of CSV, with lists (of references) that are written as JSON, and nothing for empty cells."""
    cells: dict[str, Any] = {}
    for name, text in row.items():
        if text:
            try:
                value = json.loads(text) if text.startswith("[") else text
            except json.JSONDecodeError:
                value = text
            cells[name] = value
    return cells


def field_of(row: dict[str, Any], names: tuple[str, ...], place: str) -> Any:
    """The first of the named fields that the row has. Raises ValueError naming them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{place} has none of {', '.join(names)}; it has {', '.join(row) or 'nothing'}")


def text_of(row: dict[str, Any], names: tuple[str, ...], place: str) -> str:
    """The first of the named fields, which must be a text: token ids are of no use to another tokenizer."""
    value = field_of(row, names, place)
    if not isinstance(value, str):
        raise ValueError(f"{place}: {' or '.join(names)} must be a text, it is a {type(value).__name__}")
    return value


def texts_of(value: Any, place: str) -> list[str]:
    """References as a list of texts: one text or number, or a list of them."""
    texts = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if not texts:
        raise ValueError(f"{place} has no reference to compare with")
    return texts


def prediction_of(row: dict[str, Any], place: str) -> str:
    return text_of(row, PREDICTION_FIELDS, place)


def labels_of(files: list[Path], labels: list[str] | None) -> list[str]:
    """The model of each file: its name without suffix unless given (one label may stand for all)."""
    if labels is None:
        return [file.name.split(".")[0] for file in files]
    if len(labels) == 1:
        return labels * len(files)
    if len(labels) != len(files):
        raise ValueError(
            f"--labels names {len(labels)} models, --score-only {len(files)} files; give 1 or {len(files)}"
        )
    return labels
