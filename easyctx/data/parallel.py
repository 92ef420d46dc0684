"""Tokenise batches in this process or in several, in order, with a bounded number under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from easyctx.data.pieces import cut
from easyctx.data.sources import Document
from easyctx.data.tokenizer import Encoder

BATCH_CHARACTERS = 1 << 20
BATCH_PIECES = 2048


@dataclass(frozen=True)
class Piece:
    """A document or a part of one; `first` and `last` say whether the document starts and ends here."""

    where: str
    text: str
    first: bool
    last: bool


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


def encode_in_order(
    batches: Iterable[list[Piece]], encoder: Encoder, num_proc: int
) -> Generator[tuple[Piece, np.ndarray], None, None]:
    """Yield each piece with its ids (int32 [T]), in the order given.

    With one process a fast tokenizer uses its own threads over the pieces of a batch; with more, each
    process uses one thread.
    """
    if num_proc == 1:
        for batch in batches:
            yield from zip(batch, encoder.encode([piece.text for piece in batch]), strict=True)
        return
    # Spawn, not fork: arrow's and the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    under_way: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    try:
        for batch in batches:
            under_way.append((batch, pool.submit(_encode_in_worker, [piece.text for piece in batch])))
            if len(under_way) >= 2 * num_proc:
                done, future = under_way.popleft()
                yield from zip(done, future.result(), strict=True)
        while under_way:
            done, future = under_way.popleft()
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
