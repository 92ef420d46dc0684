"""Every document of every source, tokenised, into the store."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from easyctx.data.examples import ExampleEncoder
from easyctx.data.parallel import EncoderPool, batch_pieces
from easyctx.data.readers import OpenSource
from easyctx.data.settings import DataSettings
from easyctx.data.sources import BadRecords, Record, documents_of
from easyctx.data.store import DocumentStore
from easyctx.data.tokenised import documents_of_row
from easyctx.data.tokenizer import BoundaryTokens


@dataclass(frozen=True)
class Tools:
    """What turns records into tokens. examples: for --sft, else None; cut_long: see `easyctx.data.pieces`."""

    settings: DataSettings
    boundary: BoundaryTokens
    vocabulary: int
    cut_long: bool
    pool: EncoderPool
    examples: ExampleEncoder | None
    bad: BadRecords


def fill_store(store: DocumentStore, sources: list[OpenSource], tools: Tools) -> None:
    """Tokenise all documents, source after source, into the store, with a progress bar in bytes read."""
    sizes = [source.size for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising") as progress:
        for number, source in enumerate(sources):
            limit, taken = source.source.max_tokens, 0
            for kept, is_last in _documents(source, tools, progress):
                store.append(kept)
                taken += len(kept)
                if is_last:
                    store.end(number)
                    if limit is not None and taken >= limit:
                        break


def _documents(source: OpenSource, tools: Tools, progress: Any) -> Iterator[tuple[np.ndarray, bool]]:
    """Parts of the source's documents as `store` keeps them, and whether each is its document's last."""
    records = source.records(tools.bad, progress.update)
    text_field = source.source.text_field or tools.settings.text_field
    first = next(records, None)
    if first is None:
        return
    records = itertools.chain([first], records)
    if isinstance(first.content, dict) and "input_ids" in first.content and text_field not in first.content:
        yield from ((kept, True) for kept in _tokenised(records, tools))
    elif tools.examples is not None:
        yield from ((kept, True) for _, kept in tools.examples.encode(records, tools.bad))
    else:
        yield from _texts(records, text_field, tools)


def _tokenised(records: Iterable[Record], tools: Tools) -> Iterator[np.ndarray]:
    for record in records:
        try:
            if isinstance(record.content, str) or "input_ids" not in record.content:
                raise ValueError("no input_ids, which the source's first record has")
            documents = list(documents_of_row(record.content, tools.vocabulary))
        except ValueError as error:
            tools.bad.report(record.where, str(error))
        else:
            yield from documents


def _texts(records: Iterator[Record], text_field: str, tools: Tools) -> Iterator[tuple[np.ndarray, bool]]:
    bos, eos = (
        np.array([token for token in [token_id] if token is not None], dtype=np.int32)
        for token_id in (tools.boundary.bos_id, tools.boundary.eos_id)
    )
    batches = batch_pieces(documents_of(records, text_field, tools.bad), cut_long=tools.cut_long)
    for piece, ids in tools.pool.encode(batches):
        if piece.first and piece.last and len(ids) == 0:
            tools.bad.report(piece.where, "gives no tokens")
            continue
        yield np.concatenate([bos] * piece.first + [ids] + [eos] * piece.last), piece.last
