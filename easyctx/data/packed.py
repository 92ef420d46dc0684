"""Rows that hold several documents: the columns that record their borders, checked and made into batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from easyctx.documents import Documents
from easyctx.inputs import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

# Each is one way to record where documents begin: numbers [S], positions [S] that begin again, cumulated lengths.
BORDER_COLUMNS = ("document_ids", "position_ids", "cu_seqlens")
CHECKED_TOKENS = 1 << 24  # at a time


def check_borders(dataset: Dataset, column: str) -> None:
    """ValueError, naming the row, for borders that cannot be those of documents one after the other."""
    rows = max(1, CHECKED_TOKENS // max(len(dataset[0]["input_ids"]), 1))
    columns = dataset.select_columns(["input_ids", column]).with_format("torch")
    start = 0
    for batch in columns.iter(batch_size=rows):
        for offset, (ids, borders) in enumerate(zip(batch["input_ids"], batch[column], strict=True)):
            try:
                _documents(column, {"input_ids": ids, column: borders})
            except ValueError as error:
                raise ValueError(f"row {start + offset} of the dataset, column {column}: {error}") from None
        start += len(batch["input_ids"])


def collate(
    rows: list[dict[str, torch.Tensor]], most: int, padded: Callable[[int], int] | None = None
) -> dict[str, Any]:
    """A batch of rows, of at most `most` tokens each: `input_ids` and `labels` [B, S], and `documents` where the rows
    record their borders. Shorter rows are padded with tokens that are no targets.

    padded: from the longest row's length to S, at least as long; the batch then has `row_lengths`, int64 [B], too.
    """
    own_lengths = [min(most, len(row["input_ids"])) for row in rows]
    length = max(own_lengths) if padded is None else padded(max(own_lengths))
    rows = [{"labels": row["input_ids"], **row} for row in rows]
    batch: dict[str, Any] = {
        name: torch.stack([_fitted(row[name], length, IGNORE_INDEX if name == "labels" else 0) for row in rows])
        for name in rows[0]
        if name not in BORDER_COLUMNS
    }
    if recorded := [name for name in BORDER_COLUMNS if name in rows[0]]:
        of_rows = [_documents(recorded[0], row) for row in rows]
        starts = [each.cut(length).padded(length).starts[0] for each in of_rows]
        batch["documents"] = Documents(length, tuple(starts))
    if padded is not None:
        batch["row_lengths"] = torch.tensor(own_lengths)
    return batch


def _fitted(values: torch.Tensor, length: int, padding: int) -> torch.Tensor:
    return torch.nn.functional.pad(values[:length], (0, max(length - len(values), 0)), value=padding)


def _documents(column: str, row: dict[str, torch.Tensor]) -> Documents:
    if column == "cu_seqlens":
        return Documents.from_cu_seqlens(row[column], len(row["input_ids"]))
    make = Documents.from_ids if column == "document_ids" else Documents.from_position_ids
    return make(row[column][None])
