"""Tokenise batches in this process or in several, in order, with a bounded number under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from easyctx.data.pieces import cut
from easyctx.data.sources import Document
from easyctx.data.tokenizer import Encoder

BATCH_CHARACTERS = 1 << 20
BATCH_PIECES = 2048
BYTES_FOR_A_PROCESS = 32 << 20  # of text, to be worth its start


@dataclass(frozen=True)
class Piece:
    """A document or a part of one; `first` and `last` say whether the document starts and ends here."""

    where: str
    text: str
    first: bool
    last: bool


def choose_num_proc(total_bytes: int | None) -> int:
    """Processes for that many bytes of text (None: not known): at most one a core, each with enough to do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if total_bytes is None else max(1, min(cores, total_bytes // BYTES_FOR_A_PROCESS))


def batch_pieces(documents: Iterable[Document], *, cut_long: bool) -> Iterator[list[Piece]]:
    """Group documents, cut where that is exact, into batches of bounded size."""
    batch: list[Piece] = []
    characters = 0
    for document in documents:
        texts = list(cut(document.text)) if cut_long else [document.text]
        for index, text in enumerate(texts):
            batch.append(Piece(document.where, text, index == 0, index == len(texts) - 1))
            characters += len(text)
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


class EncoderPool:
    """An encoder in this process (`num_proc` 1) or in that many others, started when first needed."""

    def __init__(self, encoder: Encoder, num_proc: int) -> None:
        self._encoder, self._num_proc = encoder, num_proc
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, batches: Iterable[list[Piece]]) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yield each piece with its ids (int32 [T]), in the order given."""
        if self._num_proc == 1:
            for batch in batches:
                yield from zip(batch, self._encoder.encode([piece.text for piece in batch]), strict=True)
            return
        if self._pool is None:
            # Spawn, not fork: arrow's and the tokenizer's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._num_proc, mp_context=context, initializer=_start_worker, initargs=(self._encoder,)
            )
        under_way: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
        for batch in batches:
            under_way.append((batch, self._pool.submit(_encode_in_worker, [piece.text for piece in batch])))
            if len(under_way) >= 2 * self._num_proc:
                done, future = under_way.popleft()
                yield from zip(done, future.result(), strict=True)
        while under_way:
            done, future = under_way.popleft()
            yield from zip(done, future.result(), strict=True)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    # Ctrl-C reaches the whole group; the parent alone answers it, and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = encoder


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    assert _worker_encoder is not None
    return _worker_encoder.encode(texts)
