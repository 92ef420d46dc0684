"""The data of a check: random tokens, ragged targets, and for `--packed` documents of random lengths."""

from dataclasses import dataclass

import torch

from easyctx.check.settings import ROWS
from easyctx.inputs import IGNORE_INDEX

DOCUMENTS = 4  # to a row


@dataclass(frozen=True)
class Batch:
    """Whole rows, int64 `[R, S]`: tokens, their own labels (not shifted; -100 hides one), and document ids or None."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor | None = None

    def documents(self) -> list[tuple[int, slice]]:
        """(row, tokens) of every document; without documents, the rows."""
        rows, length = self.input_ids.shape
        if self.document_ids is None:
            return [(row, slice(0, length)) for row in range(rows)]
        found = []
        for row in range(rows):
            counts = self.document_ids[row].unique_consecutive(return_counts=True)[1].tolist()
            ends = torch.tensor(counts).cumsum(0).tolist()
            found += [(row, slice(end - count, end)) for count, end in zip(counts, ends, strict=True)]
        return found


def make_batch(index: int, *, seed: int, length: int, vocabulary: int, packed: bool) -> Batch:
    """Batch number `index`, the same wherever it is made.

    About 30% of the labels are -100, and of the last row's one half, so that some shards have no target at all.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    ids = torch.randint(0, vocabulary, (ROWS, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ROWS, length, generator=generator) < 0.3] = IGNORE_INDEX
    hidden = slice(length // 2, length) if index % 2 == 0 else slice(0, length // 2)
    labels[-1, hidden] = IGNORE_INDEX
    documents = torch.stack([_document_ids(length, generator) for _ in range(ROWS)]) if packed else None
    return Batch(ids, labels, documents)


def _document_ids(length: int, generator: torch.Generator) -> torch.Tensor:
    """int64 `[S]`: one document of half the row or more, first or last, and the rest cut at random."""
    cuts = torch.randperm(length // 2 - 1, generator=generator)[: DOCUMENTS - 1] + 1
    if torch.rand((), generator=generator) < 0.5:
        cuts = length - cuts
    starts = torch.zeros(length, dtype=torch.int64)
    starts[cuts] = 1
    return starts.cumsum(0)
