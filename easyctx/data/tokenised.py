"""Documents from rows that are tokenised already, and the proof that the tokenizer is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from easyctx.data.readers import card_of
from easyctx.data.rows import NO_LOSS
from easyctx.data.store import without_loss
from easyctx.data.tokenizer import vocabulary_size


def fingerprint(tokenizer: Any, below: int | None = None) -> str:
    """Of a tokenizer's vocabulary: the same for all that give the same tokens the same ids.

    below: leave out this id and all above it.
    """
    known = [item for item in tokenizer.get_vocab().items() if below is None or item[1] < below]
    vocabulary = sorted(known, key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_same_tokenizer(path: str, tokenizer_name: str, own: str) -> str | None:
    """ValueError if the card of a tokenised folder names another vocabulary; a warning if nothing can be known."""
    card = card_of(path)
    recorded = (card or {}).get("tokenizer", {})
    if "fingerprint" not in recorded:
        return (
            f"warning: {path} does not record its tokenizer; that it is {tokenizer_name} is checked only by its ids "
            "being within the vocabulary"
        )
    if recorded["fingerprint"] != own:
        raise ValueError(
            f"source {path} was tokenised with {recorded['name']} (vocabulary {recorded['fingerprint']}), but "
            f"--tokenizer {tokenizer_name} has the vocabulary {own}: give that tokenizer, or tokenise its text again"
        )
    return None


def check_models_tokenizer(called: str, path: str, tokenizer: Any, model: str) -> None:
    """ValueError where `easyctx data` made the rows of `path` with other ids than those of the model's tokenizer.

    The model's may know more tokens behind the others, such as one to pad with.

    Args:
        called: the rows in the error, such as "--data FOLDER".
    """
    made_with = (card_of(path) or {}).get("tokenizer", {})
    recorded, now = made_with.get("fingerprint"), vocabulary_size(tokenizer)
    before = made_with.get("vocabulary_size", now)
    way_out = "tokenise the text with the model's own, or put the right tokenizer's files beside its weights"
    if now < before or (now > before and recorded is None):
        raise ValueError(
            f"{called} was tokenised with {made_with.get('name')}, which knows {before} tokens, but the tokenizer "
            f"of {model} knows {now}: {way_out}"
        )
    own = fingerprint(tokenizer, below=before)
    if recorded not in (None, own):
        among = f" up to id {before - 1}" if now > before else ""
        raise ValueError(
            f"{called} was tokenised with {made_with.get('name')} (vocabulary {recorded}), but the tokenizer of "
            f"{model} has the vocabulary {own}{among}, in which tokens have other ids: {way_out}"
        )


def documents_of_row(row: dict[str, Any], vocabulary: int) -> Iterator[np.ndarray]:
    """The documents of a row (int32, as `easyctx.data.store` keeps them), cut at the borders that it records.

    `labels` of -100 or `loss_mask` of 0 stay without loss. A document without any loss, such as padding, is left out.
    Raises ValueError for ids outside the vocabulary and columns of another length.
    """
    ids = np.asarray(row["input_ids"])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids are no list of integers but {ids.dtype} of {ids.ndim} dimensions")
    if len(ids) == 0:
        raise ValueError("no tokens")
    if ids.min() < 0 or ids.max() >= vocabulary:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"token id {wrong}, outside the tokenizer's vocabulary of {vocabulary}: it was tokenised with another one"
        )
    learnt = _learnt(row, ids)
    kept = np.where(learnt, ids, without_loss(ids)).astype(np.int32)
    borders = _borders(row, ids)
    for document, has_loss in zip(np.split(kept, borders), np.split(learnt, borders), strict=True):
        if has_loss.any():
            yield document


def _borders(row: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """Where documents begin in the row, but for the first."""
    if row.get("document_ids") is not None:
        return np.flatnonzero(np.diff(_column(row, "document_ids", ids))) + 1
    if row.get("position_ids") is not None:
        return np.flatnonzero(_column(row, "position_ids", ids)[1:] == 0) + 1
    if row.get("cu_seqlens") is not None:
        return np.asarray(row["cu_seqlens"])[1:-1]
    return np.zeros(0, dtype=np.int64)


def _learnt(row: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    if row.get("labels") is not None:
        labels = _column(row, "labels", ids)
        if ((labels != ids) & (labels != NO_LOSS)).any():
            raise ValueError(f"labels are neither the input_ids nor {NO_LOSS}: only such are kept")
        return labels != NO_LOSS
    if row.get("loss_mask") is not None:
        return _column(row, "loss_mask", ids) != 0
    return np.ones(len(ids), dtype=bool)


def _column(row: dict[str, Any], name: str, ids: np.ndarray) -> np.ndarray:
    values = np.asarray(row[name])
    if values.shape != ids.shape:
        raise ValueError(f"{name} has shape {values.shape}, input_ids {ids.shape}: they must have one value a token")
    return values
