"""Packed rows: where documents begin, so that attention never crosses from one into the next."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, row by row. Plain numbers on the host, since what is computed and sent follows
    from them.

    length: tokens in a row.
    starts: for every row the positions at which documents begin, ascending from 0.
    """

    length: int
    starts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for row, starts in enumerate(self.starts):
            if not starts or starts[0] != 0:
                raise ValueError(f"the first document of row {row} begins at {starts[:1] or 'nothing'}, not at 0")
            if any(a >= b for a, b in itertools.pairwise(starts)):
                raise ValueError(f"the documents of row {row} do not begin at ascending positions: {_short(starts)}")
            if starts[-1] >= self.length:
                raise ValueError(f"a document of row {row} begins at {starts[-1]}, and rows have {self.length} tokens")
        # Plans are looked up by documents many times a layer, and Python would go through all of them each time.
        object.__setattr__(self, "_hash", hash((self.length, self.starts)))

    def __hash__(self) -> int:
        number: int = self.__dict__["_hash"]
        return number

    @classmethod
    def from_ids(cls, document_ids: torch.Tensor) -> "Documents":
        """From int `[B, S]`: the number of the document that each token belongs to.

        Raises ValueError if the numbers decrease in a row: a document is one stretch.
        """
        steps = document_ids.diff(dim=1)
        if bool((steps < 0).any()):
            row, place = (int(i) for i in (steps < 0).nonzero()[0])
            before, after = (int(document_ids[row, i]) for i in (place, place + 1))
            raise ValueError(
                f"document ids decrease from {before} to {after} at position {place + 1} of row {row}: a document is "
                "one stretch of a row, so number them 0, 1, 2, … in the order in which they stand"
            )
        return cls._from_borders(steps != 0)

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor) -> "Documents":
        """From int `[B, S]` positions that count up by one and begin anew at 0 with every document."""
        steps = position_ids.diff(dim=1)
        wrong = (steps != 1) & (position_ids[:, 1:] != 0)
        if bool(wrong.any()) or bool((position_ids[:, 0] != 0).any()):
            row = int((wrong.any(1) | (position_ids[:, 0] != 0)).nonzero()[0])
            place = int(wrong[row].nonzero()[0]) + 1 if bool(wrong[row].any()) else 0
            before = int(position_ids[row, place - 1]) if place else "the start of the row"
            raise ValueError(
                f"position_ids of row {row} go from {before} to {int(position_ids[row, place])} at position {place}: "
                "in a packed row they count up by one and begin again at 0 with every document"
            )
        return cls._from_borders(steps != 1)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor | Sequence[int], length: int) -> "Documents":
        """From the cumulated lengths 0, n1, n1 + n2, …, `length` of the documents of one row.

        Raises ValueError if they do not begin at 0, do not ascend, or end anywhere but at `length` (tokens).
        """
        ends = [int(end) for end in cu_seqlens]
        if len(ends) < 2 or ends[0] != 0:
            raise ValueError(f"cu_seqlens begin with {ends[:1] or 'nothing'}: give 0, n1, n1 + n2, …, {length}")
        if ends[-1] != length:
            raise ValueError(
                f"cu_seqlens end at {ends[-1]}, but the row has {length} tokens: make the last of them {length}, "
                "with padding as a document of its own"
            )
        return cls(length, (tuple(ends[:-1]),))

    @classmethod
    def _from_borders(cls, is_border: torch.Tensor) -> "Documents":
        """From bool `[B, S - 1]`, True where a document begins at the next position."""
        rows = [(0, *(torch.nonzero(row).flatten() + 1).tolist()) for row in is_border]
        return cls(is_border.shape[1] + 1, tuple(rows))

    @property
    def is_plain(self) -> bool:
        """Whether every row is one document."""
        return all(len(starts) == 1 for starts in self.starts)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(int(lengths.max()) for lengths in self._lengths())

    def check_fits(self, batch: int, length: int) -> None:
        """ValueError unless these are the documents of `batch` rows (or of one, for all rows) of `length` tokens."""
        if self.length != length:
            raise ValueError(
                f"the documents are those of rows of {self.length} tokens, but the rows have {length}: give those of "
                "the same rows (of a sharded batch, the padded ones that prepare_seq_parallel_inputs returns)"
            )
        if len(self.starts) not in (1, batch):
            raise ValueError(f"the documents are those of {len(self.starts)} rows, but the batch has {batch}")

    def padded(self, length: int) -> "Documents":
        """The same rows padded on the right to `length` tokens; the padding is one more document."""
        if length == self.length:
            return self
        return Documents(length, tuple((*starts, self.length) for starts in self.starts))

    def cut(self, length: int) -> "Documents":
        """At most the first `length` tokens of each row."""
        length = min(length, self.length)
        return Documents(length, tuple(tuple(s for s in starts if s < length) for starts in self.starts))

    def ids(self) -> torch.Tensor:
        """int64 `[B, S]`: the number of each token's document."""
        return torch.stack([torch.repeat_interleave(torch.arange(len(n)), n) for n in self._lengths()])

    def position_ids(self) -> torch.Tensor:
        """int64 `[B, S]`: each token's place in its document."""
        return torch.stack([torch.cat([torch.arange(int(n)) for n in lengths]) for lengths in self._lengths()])

    def _lengths(self) -> list[torch.Tensor]:
        return [torch.tensor([*starts, self.length]).diff() for starts in self.starts]


def _short(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
