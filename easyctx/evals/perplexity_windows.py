"""Which tokens of a document are scored behind which context, and their negative log-likelihoods (NLL, nats)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from easyctx.evals.documents import Document

if TYPE_CHECKING:
    from easyctx.evals.scoring import Scorer

PREFIX, SLIDING, LAST = WINDOWS = ("prefix", "sliding", "last")


@dataclass(frozen=True)
class Window:
    """What a length L means.

    prefix: the first L tokens. sliding: windows of L tokens that move by `stride`, each token scored once. last: the
    document's last `targets` tokens behind the L - `targets` tokens before them, so that all lengths score the same.
    """

    kind: str
    stride: int | None = None
    targets: int | None = None

    def nll(self, scorer: Scorer, document: Document, lengths: list[int]) -> dict[int, tuple[int, np.ndarray]]:
        """For every length: the first prediction that is scored, and the NLL of it and those behind, float64.

        Prediction i is of token i + 1. All `lengths` are at most the document's.
        """
        if self.kind == PREFIX:
            whole = prefix_nll(scorer, document.ids[: lengths[-1]])
            return {length: (0, whole[: length - 1]) for length in lengths}
        if self.kind == SLIDING:
            assert self.stride is not None
            return {length: (0, sliding_nll(scorer, document.ids, length, self.stride)) for length in lengths}
        assert self.targets is not None
        first = len(document.ids) - 1 - self.targets
        return {length: (first, last_nll(scorer, document, length, self.targets)) for length in lengths}


def score_document(
    scorer: Scorer, document: Document, lengths: list[int], window: Window, num_bins: int
) -> dict[str, Any]:
    """One row of documents.jsonl: NLL sums (nats) and counts by length, and by position at the longest."""
    begin = time.perf_counter()
    reached = [length for length in lengths if length <= len(document.ids)]
    nll = window.nll(scorer, document, reached)
    scored = np.ones(len(document.ids), dtype=bool) if document.scored is None else document.scored
    # By prediction, each of the token after it.
    counted = {length: scored[1 + first : 1 + first + len(found)] for length, (first, found) in nll.items()}
    first, longest = nll[reached[-1]]
    edges = np.unique(np.linspace(0, len(longest), num_bins + 1).round().astype(int))
    bins = [(longest[a:b], counted[reached[-1]][a:b]) for a, b in pairwise(edges)]
    return {
        "document": document.name,
        "document_hash": document.hash,
        "num_tokens": len(document.ids),
        "lengths": lengths,
        "reached": reached,
        "nll_sum": [float(nll[length][1][counted[length]].sum()) for length in reached],
        "num_scored": [int(counted[length].sum()) for length in reached],
        "bin_edges": (first + edges).tolist(),
        "bin_nll_sum": [float(found[is_counted].sum()) for found, is_counted in bins],
        "bin_num_scored": [int(is_counted.sum()) for _, is_counted in bins],
        "seconds": round(time.perf_counter() - begin, 4),
    }


def prefix_nll(scorer: Scorer, ids: np.ndarray) -> np.ndarray:
    """NLL of ids[1:] ([n - 1] float64, nats), each given all before it, from one forward."""
    import torch

    input_ids = torch.from_numpy(ids)[None]
    targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    return -scorer.score_targets(input_ids, targets).logprob[0, :-1].double().numpy()


def sliding_nll(scorer: Scorer, ids: np.ndarray, window: int, stride: int) -> np.ndarray:
    """NLL of ids[1:] ([n - 1] float64), each once, given at least window - stride tokens before it where
    there are so many."""
    parts: list[np.ndarray] = []
    scored = 0  # predictions so far; prediction i is of token i + 1
    begin = 0
    while scored < len(ids) - 1:
        end = min(begin + window, len(ids))
        nll = prefix_nll(scorer, ids[begin:end])
        parts.append(nll[scored - begin :])
        scored = end - 1
        begin += stride
    return np.concatenate(parts)


def last_nll(scorer: Scorer, document: Document, length: int, targets: int) -> np.ndarray:
    """NLL of the last `targets` tokens (float64), in a forward of `length` tokens that end with the document.

    Special tokens that stand in front of the document stand in front of each length.
    """
    leading = document.ids[: document.num_leading]
    ids = np.concatenate([leading, document.ids[len(document.ids) - length + len(leading) :]])
    return prefix_nll(scorer, ids)[-targets:]
