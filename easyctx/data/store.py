"""Tokenised documents on disk, one after the other; in memory is only where each begins, 18 bytes a document.

An id is kept as it is where the model is to learn to predict it, and as its complement ~id (negative) where it is
not: the prompt of an example, padding. So one int32 a token holds both.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

BYTES_PER_ID = 4


def without_loss(ids: np.ndarray) -> np.ndarray:
    """ids [T] int32 as kept where there is no loss on them."""
    return ~ids


def ids_and_labels(kept: np.ndarray, no_loss: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [T] and labels [T] (int32, not shifted, `no_loss` where there is none) of kept tokens."""
    masked = kept < 0
    return np.where(masked, ~kept, kept), np.where(masked, np.int32(no_loss), kept)


@dataclass(frozen=True)
class Index:
    """All documents of a store: `lengths` int64 [D], `sources` int64 [D] and `hashes` uint64 [D], of their ids."""

    lengths: np.ndarray
    sources: np.ndarray
    hashes: np.ndarray


class DocumentStore:
    """A file of documents: `append` and `end` write them in order, `read` gives any stretch of one back."""

    def __init__(self, path: Path, seed: int) -> None:
        self._file = path.open("w+b", buffering=1 << 20)
        self._key = seed.to_bytes(16, "little", signed=True)
        self._lengths, self._sources, self._hashes = array("q"), array("H"), array("Q")
        self._starts = np.zeros(0, dtype=np.int64)
        self.has_unlearnt = False  # whether there is a token without loss
        self._begin()

    def __enter__(self) -> DocumentStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _begin(self) -> None:
        self._length = 0
        self._hash = hashlib.blake2b(key=self._key, digest_size=8)

    def append(self, kept: np.ndarray) -> None:
        """Add tokens (int32 [T]) to the document that is being written."""
        data = np.ascontiguousarray(kept, dtype=np.int32)
        self._file.write(data.data)
        self._hash.update(data.data)
        self._length += len(data)
        self.has_unlearnt = self.has_unlearnt or bool(len(data) and data.min() < 0)

    def end(self, source: int) -> None:
        """The document is whole; it came from source number `source`."""
        self._lengths.append(self._length)
        self._sources.append(source)
        self._hashes.append(int.from_bytes(self._hash.digest(), "little"))
        self._begin()

    def index(self) -> Index:
        """All documents written; reading can begin."""
        self._file.flush()
        lengths = np.array(self._lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        return Index(lengths, np.array(self._sources, dtype=np.int64), np.array(self._hashes, dtype=np.uint64))

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """`count` tokens (int32) of a document from its token `start` on."""
        # Not a memory map: its pages would count as this process's memory.
        at = BYTES_PER_ID * (int(self._starts[document]) + start)
        data = os.pread(self._file.fileno(), BYTES_PER_ID * count, at)
        if len(data) != BYTES_PER_ID * count:
            raise OSError(f"{self._file.name}: {len(data)} of {BYTES_PER_ID * count} bytes could be read back")
        return np.frombuffer(data, dtype=np.int32)
