"""Which documents are written, how often, and in what order. Arithmetic on lengths; no text, no files.

**Mix.** Without weights every document is written once. With weights w_s source s gives the share w_s / sum(w) of the
tokens, in whole documents. In all they are `tokens`, or else as many as the mix allows without a second pass over
any source.

**Long documents** (per-source up-sampling; Fu et al. 2024, arXiv 2402.10171). Documents of at least `long_from` tokens
(with their BOS and EOS) are long. In every source whose long documents hold less than `long_share` of its tokens, but
any at all, they are drawn until they do: long ones are repeated and short ones left out, while the source's number of
tokens, and so the mix of the sources, stays. A source without long documents stays as it is.

**Drawing** t tokens from documents that hold T: each floor(t / T) times, and for the rest a random few once more, to
the document that comes closest. **Order**: with weights, long documents, `tokens` or `shuffle` the c copies of a
document come one in each c-th part of the data, at random places; else as read.

**Validation**: in each source the share of documents whose hashes (of their ids, keyed with the seed) are smallest, and
every document, of any source, with the same ids as one of them. They are written once each, in the order as read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from easyctx.data.store import Index


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What was asked of the plan; see above. weights: one for each source, or None."""

    weights: Sequence[float] | None = None
    tokens: int | None = None
    long_from: int | None = None
    long_share: float | None = None
    validation: float = 0.0
    shuffle: bool = False
    seed: int = 0

    @property
    def draws(self) -> bool:
        """Whether documents may be repeated or left out."""
        return self.weights is not None or self.tokens is not None or self.long_from is not None


@dataclass(frozen=True)
class Plan:
    """Numbers of documents in the order in which they are written; in `train` with repetitions."""

    train: np.ndarray
    validation: np.ndarray


def make_plan(index: Index, names: Sequence[str], wishes: Wishes) -> Plan:
    """The plan for the documents of a store; `names` are the sources'.

    Raises ValueError for a source without documents, or without any left beside those for validation.
    """
    counts = np.bincount(index.sources, minlength=len(names))
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise ValueError(f"source {name} gives no documents: leave it out, or mend it")
    validation = _choose_validation(index, names, wishes.validation)
    train = ~validation
    left = np.bincount(index.sources[train], minlength=len(names))
    for name, count, remain in zip(names, counts, left, strict=True):
        if remain == 0:
            raise ValueError(
                f"source {name}: all {count} documents (equal ones counted) would be for validation and none for "
                f"training: lower --validation {wishes.validation:g}, or leave it out"
            )
    rng = np.random.default_rng(wishes.seed)
    chosen = np.flatnonzero(train)
    if wishes.draws:
        chosen = _draw_sources(index, chosen, names, wishes, rng)
    if wishes.draws or wishes.shuffle:
        chosen = spread(chosen, rng)
    return Plan(chosen, np.flatnonzero(validation))


def _choose_validation(index: Index, names: Sequence[str], share: float) -> np.ndarray:
    """bool [D]: whether a document is for validation."""
    if share == 0:
        return np.zeros(len(index.hashes), dtype=bool)
    chosen = []
    for source in range(len(names)):
        hashes = np.sort(index.hashes[index.sources == source])
        chosen.append(hashes[: max(1, round(share * len(hashes)))])
    return np.isin(index.hashes, np.concatenate(chosen))


def _draw_sources(
    index: Index, documents: np.ndarray, names: Sequence[str], wishes: Wishes, rng: np.random.Generator
) -> np.ndarray:
    of_source = [documents[index.sources[documents] == source] for source in range(len(names))]
    held = np.array([index.lengths[numbers].sum() for numbers in of_source], dtype=np.float64)
    shares = np.asarray(held if wishes.weights is None else wishes.weights, dtype=np.float64)
    shares = shares / shares.sum()
    total = (held / shares).min() if wishes.tokens is None else wishes.tokens
    drawn = []
    for name, numbers, target in zip(names, of_source, shares * total, strict=True):
        parts = _strata(index.lengths, numbers, float(target), wishes)
        of_parts = [draw(part, index.lengths[part], part_target, rng) for part, part_target in parts]
        if not any(map(len, of_parts)):
            raise ValueError(
                f"source {name} is to give {target:,.0f} tokens, but its documents have "
                f"{index.lengths[numbers].min():,} at least, so none is taken: raise its weight or --tokens, or leave "
                "it out"
            )
        drawn += of_parts
    return np.concatenate(drawn)


def _strata(lengths: np.ndarray, numbers: np.ndarray, target: float, wishes: Wishes) -> list[tuple[np.ndarray, float]]:
    """A source's documents in one part, or long and short ones apart, and the tokens to draw from each part."""
    if wishes.long_from is None or wishes.long_share is None:
        return [(numbers, target)]
    is_long = lengths[numbers] >= wishes.long_from
    natural = lengths[numbers[is_long]].sum() / lengths[numbers].sum()
    if not 0 < natural < wishes.long_share:
        return [(numbers, target)]
    share = wishes.long_share
    return [(numbers[is_long], share * target), (numbers[~is_long], (1 - share) * target)]


def draw(documents: np.ndarray, lengths: np.ndarray, tokens: float, rng: np.random.Generator) -> np.ndarray:
    """Documents (with repetitions, pass after pass) that hold about `tokens` tokens: off by less than the longest."""
    held = int(lengths.sum())
    passes = int(tokens // held)
    order = rng.permutation(len(documents))
    ends = np.concatenate([[0], np.cumsum(lengths[order])])
    more = int(np.abs(ends - (tokens - passes * held)).argmin())
    return np.concatenate([np.tile(documents, passes), documents[order[:more]]])


def spread(documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same numbers in random order, the copies of one spread evenly over the whole."""
    grouped = np.sort(documents, kind="stable")
    _, first, copies = np.unique(grouped, return_index=True, return_counts=True)
    of = np.repeat(copies, copies)
    which = np.arange(len(grouped)) - np.repeat(first, copies)
    places = (which + rng.random(len(grouped))) / of
    return grouped[np.argsort(places, kind="stable")]
