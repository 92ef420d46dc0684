"""Join documents into one stream of tokens and write it as rows of one length."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

FLUSH_TOKENS = 1 << 20
NO_LOSS = -100


class RowWriter:
    """Writes an Arrow stream file with `input_ids` (list of int32, `seq_length` each), row after row.

    With `borders` also `document_ids`: int32, 0 at the start of each row, one more at each new document.
    With `labels` also `labels`: the ids, and -100 for padding (not shifted).
    Memory is bounded by the longest of one row, one piece and 1M tokens.
    """

    def __init__(self, path: Path, seq_length: int, *, borders: bool = False, labels: bool = False) -> None:
        self.seq_length = seq_length
        self.rows = 0
        self.tokens = 0
        self._names = ["input_ids"] + ["document_ids"] * borders + ["labels"] * labels
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in self._names])
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        self._ids: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._pending = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        self._sink.close()

    def add(self, ids: np.ndarray, document: int) -> None:
        """Append `ids` (int32 [T]) of document number `document`; the numbers must not decrease."""
        self._ids.append(ids)
        self._documents.append(np.full(len(ids), document, dtype=np.int64))
        self._pending += len(ids)
        self.tokens += len(ids)
        if self._pending >= max(FLUSH_TOKENS, self.seq_length):
            self._flush()

    def finish(self, pad_id: int | None = None) -> int:
        """Write what is left; returns the number of tokens that fill no row (dropped) or of padding.

        `pad_id` fills the last row (labels -100, a document of its own); None drops it.
        """
        self._flush()
        left = self._pending
        if pad_id is None or left == 0:
            return left
        missing = self.seq_length - left
        ids = np.append(self._ids[0], np.full(missing, pad_id, dtype=np.int32))
        documents = np.append(self._documents[0], np.full(missing, self._documents[0][-1] + 1))
        labels = np.append(self._ids[0], np.full(missing, NO_LOSS, dtype=np.int32))
        self._write(ids, documents, labels)
        return missing

    def _flush(self) -> None:
        if not self._ids:
            return
        ids, documents = np.concatenate(self._ids), np.concatenate(self._documents)
        whole = len(ids) // self.seq_length * self.seq_length
        if whole:
            self._write(ids[:whole], documents[:whole], ids[:whole])
        self._pending = len(ids) - whole
        # Copies, so that the big arrays they are cut from can go.
        self._ids, self._documents = [ids[whole:].copy()], [documents[whole:].copy()]

    def _write(self, ids: np.ndarray, documents: np.ndarray, labels: np.ndarray) -> None:
        rows = len(ids) // self.seq_length
        by_row = documents.reshape(rows, self.seq_length)
        columns = {
            "input_ids": ids,
            "document_ids": (by_row - by_row[:, :1]).reshape(-1).astype(np.int32),
            "labels": labels,
        }
        offsets = pa.array(np.arange(rows + 1) * self.seq_length, type=pa.int32())
        arrays = [pa.ListArray.from_arrays(offsets, pa.array(columns[name])) for name in self._names]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self.rows += rows
