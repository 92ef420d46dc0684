"""What of an example is left out where it has more tokens than it may: the end of its document, of its response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """An example's tokens; `stays` is what cutting changes.

    ids: int32 [T], with what marks the beginning and the end.
    starts, ends: int64 [T], the characters that each came from; -1 for marks, which came from none.
    learnt: bool [T].
    stays: bool [T].
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    learnt: np.ndarray
    stays: np.ndarray


def cut_response(tokens: Tokens, last: Span, most: int) -> bool:
    """Leave out the end of the last response, with its end mark, where more than `most` tokens are learnt.

    Returns whether that was so. ValueError where nothing of the last response would be left.
    """
    number = int(tokens.learnt.sum())
    if number <= most:
        return False
    is_mark = tokens.starts < 0
    of_last = np.flatnonzero(tokens.learnt & (is_mark | (tokens.starts >= last[0])))
    excess = number - most
    if excess >= len(of_last):
        raise ValueError(
            f"the responses have {number} tokens, of which the last has {len(of_last)} and may be cut, and "
            f"--max-target-tokens is {most}: raise it, or make each response a conversation of its own"
        )
    tokens.stays[of_last[len(of_last) - excess :]] = False
    return True


@dataclass(frozen=True)
class Limit:
    """`flag` allows `most` tokens, and there are `number`; `what` is to be read before "alone have 9 tokens"."""

    flag: str
    most: int
    number: int
    what: str

    @property
    def excess(self) -> int:
        return self.number - self.most


def cut_document(tokens: Tokens, document: Span | None, limits: Sequence[Limit]) -> bool:
    """Leave out the end of the document where there is more than may be.

    document: its characters; None if nothing may be cut.

    Returns whether something was cut. ValueError where more than the document would have to be.
    """
    limit = max(limits, key=lambda limit: limit.excess)
    excess = limit.excess
    if excess <= 0:
        return False
    if document is None:
        raise ValueError(
            f"{limit.what} have {limit.number} tokens, {limit.flag} is {limit.most}, and nothing of them may be cut: "
            "raise it, or give what may be cut as `document`"
        )
    inside = (tokens.starts >= document[0]) & (tokens.ends <= document[1]) & (tokens.ends > tokens.starts)
    of_document = np.flatnonzero(inside & ~tokens.learnt)
    if len(of_document) < excess:
        raise ValueError(
            f"{limit.what} alone have {limit.number - len(of_document)} tokens, more than {limit.flag} {limit.most}: "
            "raise it"
        )
    tokens.stays[of_document[len(of_document) - excess :]] = False
    return True
