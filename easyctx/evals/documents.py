"""Documents for perplexity: text, JSON lines or tokenised rows, as token ids with the tokenizer's own BOS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from easyctx.data.rows import NO_LOSS
from easyctx.data.store import ids_and_labels
from easyctx.data.tokenised import documents_of_row
from easyctx.data.tokenizer import vocabulary_size
from easyctx.evals.encoding import TextEncoder
from easyctx.evals.textio import JSONL_SUFFIXES, TEXT_SUFFIXES, files_under, read_jsonl, read_text

SPLITS_FILE = "dataset_dict.json"
DATASET_FILES = ("state.json", SPLITS_FILE)  # what datasets' save_to_disk leaves
VALIDATION = ("validation", "valid", "val", "dev", "eval")
CHARS_PER_TOKEN = 16  # more than any tokenizer packs into a token on average; only saves tokenising the rest


@dataclass(frozen=True)
class Document:
    """The first tokens of one document, special tokens in front included: ids [n] int64.

    `scored` [n] bool: the tokens that a model was to learn; None for all. `num_leading`: special tokens in front, where
    they are known (of text; 0 for rows of tokens).
    """

    name: str
    ids: np.ndarray
    scored: np.ndarray | None = None
    num_leading: int = 0

    @property
    def hash(self) -> str:
        scored = b"" if self.scored is None else np.packbits(self.scored).tobytes()
        return hashlib.sha256(self.ids.astype("<i8").tobytes() + scored).hexdigest()[:16]


def check_data(data: Path, asked: str | None = None) -> str | None:
    """The split of a tokenised dataset that is read: the one asked for, the only one, or that for validation.

    None where there are no splits. Raises ValueError where `data` is nothing that `read_documents` reads, has no such
    split, or several none of which is for validation.
    """
    if not data.exists():
        raise ValueError(f"--data {data} does not exist")
    if not _is_dataset(data):
        files_under(data, TEXT_SUFFIXES + JSONL_SUFFIXES)
    splits = _splits_of(data)
    if asked is not None and asked not in splits:
        there = f"its splits are {', '.join(splits)}" if splits else "it has none"
        raise ValueError(f"--data {data} has no split {asked!r}, {there}: change --data-split, or leave it out")
    held_out = [name for name in splits if name in VALIDATION]
    if asked is None and len(splits) > 1 and not held_out:
        raise ValueError(f"--data {data} has the splits {', '.join(splits)}: name one with --data-split")
    return asked or next(iter(held_out or splits), None)


def _splits_of(data: Path) -> list[str]:
    file = data / SPLITS_FILE
    return list(json.loads(file.read_text())["splits"]) if file.is_file() else []


def read_documents(
    data: Path,
    encoder: TextEncoder,
    *,
    max_tokens: int,
    min_tokens: int,
    max_documents: int | None,
    split: bool = False,
    text_field: str = "text",
    data_split: str | None = None,
) -> list[Document]:
    """The first `max_documents` documents of at least `min_tokens` tokens, each cut to `max_tokens`.

    `split` makes of a long document as many of `max_tokens` as it holds (each with BOS in front). `data_split` is
    that of a dataset which has several. Of rows with labels or a loss mask, what a model would learn is scored.
    Raises ValueError where no document is long enough, naming the longest.
    """
    longest = 0
    documents: list[Document] = []
    for name, source in _sources(data, text_field, vocabulary_size(encoder.tokenizer), data_split):
        if isinstance(source, str):
            pieces, num_leading = _tokenise(source, encoder, max_tokens, split), len(encoder.leading)
        else:
            pieces, num_leading = _cut(np.asarray(source, dtype=np.int64), max_tokens, split), 0
        for number, piece in enumerate(pieces):
            longest = max(longest, len(piece))
            ids, scored = _ids_and_scored(piece) if isinstance(source, np.ndarray) else (piece, None)
            if len(piece) >= min_tokens and (scored is None or scored[1:].any()):
                documents.append(Document(f"{name}#{number}" if split else name, ids, scored, num_leading))
                if len(documents) == max_documents:
                    return documents
    if not documents:
        if longest >= min_tokens:
            raise ValueError(f"--data {data} has no label in the first {max_tokens} tokens of a row: raise --lengths")
        raise ValueError(
            f"--data {data} has no document of {min_tokens} tokens, the longest has {longest}: "
            "give shorter --lengths, or a smaller --min-tokens"
        )
    return documents


def _is_dataset(data: Path) -> bool:
    return data.is_dir() and any((data / name).exists() for name in DATASET_FILES)


def _ids_and_scored(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    ids, labels = ids_and_labels(kept, NO_LOSS)
    scored = labels != NO_LOSS
    return ids, None if scored.all() else scored


def _sources(
    data: Path, text_field: str, vocabulary: int, data_split: str | None
) -> Iterator[tuple[str, str | list[int] | np.ndarray]]:
    """(name, text, token ids, or those as `easyctx.data.store` keeps them) of each document in order."""
    if _is_dataset(data):
        yield from _documents_of_rows(data, vocabulary, data_split)
        return
    for file in files_under(data, TEXT_SUFFIXES + JSONL_SUFFIXES):
        name = str(file.relative_to(data)) if data.is_dir() else file.name
        if not file.name.endswith(JSONL_SUFFIXES):
            yield name, read_text(file)
            continue
        for number, row in read_jsonl(file):
            value = row.get("input_ids", row.get(text_field))
            if not isinstance(value, str | list):
                raise ValueError(f"{file} line {number} has neither input_ids nor a text in {text_field!r}")
            yield f"{name}:{number}", value


def _documents_of_rows(data: Path, vocabulary: int, split: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of a dataset; where they record the borders of documents, each document, and no padding."""
    from easyctx.data.load import load_tokenised

    for number, row in enumerate(load_tokenised(data, split)):
        name = f"{data.name}:{number}"
        try:
            documents = list(documents_of_row(row, vocabulary))
        except ValueError as error:
            raise ValueError(f"--data {data} row {number}: {error}") from error
        for place, kept in enumerate(documents):
            yield name if len(documents) == 1 else f"{name}.{place}", kept


def _tokenise(text: str, encoder: TextEncoder, max_tokens: int, split: bool) -> Iterator[np.ndarray]:
    leading = np.asarray(encoder.leading, dtype=np.int64)
    num_chars = CHARS_PER_TOKEN * max_tokens
    ids = encoder.encode(text if split else text[:num_chars]).ids
    if len(ids) < max_tokens and num_chars < len(text) and not split:
        ids = encoder.encode(text).ids
    for piece in _cut(ids, max_tokens - len(leading), split):
        yield np.concatenate([leading, piece])


def _cut(ids: np.ndarray, size: int, split: bool) -> Iterator[np.ndarray]:
    begins = range(0, max(len(ids), 1), size)
    for begin in begins if split else islice(begins, 1):
        yield ids[begin : begin + size]
