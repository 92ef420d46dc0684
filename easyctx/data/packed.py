"""Rows that hold several documents: the columns that record their borders, checked and made into batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from easyctx.documents import Documents

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
                _documents(column, [{"input_ids": ids, column: borders}])
            except ValueError as error:
                raise ValueError(f"row {start + offset} of the dataset, column {column}: {error}") from None
        start += len(batch["input_ids"])


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A batch of rows: `input_ids` and `labels` [B, S], and `documents` where the rows record their borders."""
    batch: dict[str, Any] = {
        name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in BORDER_COLUMNS
    }
    if recorded := [name for name in BORDER_COLUMNS if name in rows[0]]:
        batch["documents"] = _documents(recorded[0], rows)
    return batch


def _documents(column: str, rows: list[dict[str, torch.Tensor]]) -> Documents:
    if column == "cu_seqlens":
        of_rows = [Documents.from_cu_seqlens(row[column], len(row["input_ids"])) for row in rows]
        return Documents(of_rows[0].length, tuple(each.starts[0] for each in of_rows))
    make = Documents.from_ids if column == "document_ids" else Documents.from_position_ids
    return make(torch.stack([row[column] for row in rows]))
