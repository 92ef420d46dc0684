"""Join documents into one stream of tokens and write it as rows of one length, in a folder that `datasets` loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from easyctx.data.store import ids_and_labels, without_loss

FLUSH_TOKENS = 1 << 20
SHARD_BYTES = 500 << 20
NO_LOSS = -100
MIN_TOKENS = 2  # in a row, to predict one of them


class RowWriter:
    """Writes the Arrow files of a save_to_disk folder, row after row of `input_ids` (list of int32).

    With `borders` also `document_ids`: int32, 0 at the start of each row, one more at each new document.
    With `labels` also `labels`: the ids, and -100 where there is no loss, as on padding (not shifted).
    Memory is bounded by the longest of one row, one piece and 1M tokens.
    """

    def __init__(self, folder: Path, seq_length: int, *, borders: bool = False, labels: bool = False) -> None:
        self.seq_length = seq_length
        self.rows = 0
        self.tokens = 0
        self.padding = 0
        self._folder = folder
        self._names = ["input_ids"] + ["document_ids"] * borders + ["labels"] * labels
        self._schema = pa.schema([(name, pa.list_(pa.int32())) for name in self._names])
        self._shards: list[Path] = []
        self._sink: Any = None
        self._writer: Any = None
        self._kept: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._pending = 0

    def __enter__(self) -> RowWriter:
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_shard()

    def add(self, kept: np.ndarray, document: int) -> None:
        """Append tokens (int32 [T], as `easyctx.data.store` keeps them) of document number `document`.

        The numbers must not decrease.
        """
        self.tokens += len(kept)
        self._append(kept, document)

    def pad(self, count: int, pad_id: int, document: int) -> None:
        """Append `count` tokens of padding, without loss, as document number `document`."""
        self.padding += count
        self._append(without_loss(np.full(count, pad_id, dtype=np.int32)), document)

    def _append(self, kept: np.ndarray, document: int) -> None:
        self._kept.append(kept)
        self._documents.append(np.full(len(kept), document, dtype=np.int64))
        self._pending += len(kept)
        if self._pending >= max(FLUSH_TOKENS, self.seq_length):
            self._flush()

    def finish(self, pad_id: int | None = None) -> int:
        """Write what is left; returns the number of tokens dropped because they fill no row.

        `pad_id` fills the last row (a document of its own, no loss); None drops it, and so is a single token.
        """
        self._flush()
        left = self._pending
        if left and pad_id is not None and left >= MIN_TOKENS:
            self.pad(self.seq_length - left, pad_id, int(self._documents[0][-1]) + 1)
            self._flush()
            left = 0
        self._close_shard()
        return left

    def save(self) -> None:
        """Name the files and write what `datasets` wants beside them. The folder then loads with load_from_disk."""
        import datasets

        # The library writes the two JSON files, for an example row; then they are told of the real files.
        features = datasets.Features.from_arrow_schema(self._schema)
        example = datasets.Dataset.from_dict({name: [[0]] for name in self._names}, features=features)
        bars_were_off = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            example.save_to_disk(str(self._folder / "example"), num_shards=1)
        finally:
            if not bars_were_off:
                datasets.enable_progress_bars()
        names = [f"data-{number:05d}-of-{len(self._shards):05d}.arrow" for number in range(len(self._shards))]
        for shard, name in zip(self._shards, names, strict=True):
            shard.rename(self._folder / name)
        state = json.loads((self._folder / "example" / "state.json").read_text(encoding="utf-8"))
        state["_data_files"] = [{"filename": name} for name in names]
        (self._folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
        (self._folder / "example" / "dataset_info.json").rename(self._folder / "dataset_info.json")
        for leftover in (self._folder / "example").iterdir():
            leftover.unlink()
        (self._folder / "example").rmdir()

    def _flush(self) -> None:
        if not self._kept:
            return
        kept, documents = np.concatenate(self._kept), np.concatenate(self._documents)
        whole = len(kept) // self.seq_length * self.seq_length
        if whole:
            self._write(kept[:whole], documents[:whole], np.arange(0, whole + 1, self.seq_length))
        self._pending = len(kept) - whole
        # Copies, so that the big arrays they are cut from can go.
        self._kept, self._documents = [kept[whole:].copy()], [documents[whole:].copy()]

    def _write(self, kept: np.ndarray, documents: np.ndarray, borders: np.ndarray) -> None:
        """Write rows, the r-th of which is tokens `borders[r]` to `borders[r + 1]`."""
        rows = len(borders) - 1
        ids, labels = ids_and_labels(kept, NO_LOSS)
        if "labels" in self._names:
            self._check_learnt(labels, borders)
        columns = {
            "input_ids": ids,
            "document_ids": (documents - np.repeat(documents[borders[:-1]], np.diff(borders))).astype(np.int32),
            "labels": labels,
        }
        offsets = pa.array(borders, type=pa.int32())
        arrays = [pa.ListArray.from_arrays(offsets, pa.array(columns[name])) for name in self._names]
        if self._writer is None:
            self._open_shard()
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self.rows += rows
        if self._sink.tell() >= SHARD_BYTES:
            self._close_shard()

    def _check_learnt(self, labels: np.ndarray, borders: np.ndarray) -> None:
        """ValueError for a row without a target: the train loop would learn nothing from it."""
        is_target = labels != NO_LOSS
        is_target[borders[:-1]] = False  # nothing comes before a row's first token to predict it
        empty = ~np.logical_or.reduceat(is_target, borders[:-1])
        if empty.any():
            raise ValueError(
                f"row {self.rows + int(empty.argmax())} would have no token to learn: the loss mask of its documents "
                f"hides all of --seq-length {self.seq_length}. Give a --seq-length as long as those rows, and --pack"
            )

    def _open_shard(self) -> None:
        self._shards.append(self._folder / f"part-{len(self._shards):05d}")
        self._sink = pa.OSFile(str(self._shards[-1]), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None


class OwnLengthWriter(RowWriter):
    """Writes each document as a row of its own length, which `seq_length` bounds."""

    def finish(self, pad_id: int | None = None) -> int:
        assert pad_id is None
        self._write_documents(np.iinfo(np.int64).max)
        self._close_shard()
        return 0

    def _flush(self) -> None:
        """Write the documents that are whole: of the last, more may come."""
        self._write_documents(int(self._documents[-1][-1]))

    def _write_documents(self, end: int) -> None:
        """Write the documents numbered below `end`."""
        if not self._kept:
            return
        kept, documents = np.concatenate(self._kept), np.concatenate(self._documents)
        whole = int(np.searchsorted(documents, end))
        if whole:
            starts = np.flatnonzero(np.diff(documents[:whole], prepend=-1))
            self._write(kept[:whole], documents[:whole], np.append(starts, whole))
        self._pending = len(kept) - whole
        self._kept, self._documents = [kept[whole:].copy()], [documents[whole:].copy()]
