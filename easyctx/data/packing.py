"""Packing of documents into rows without cutting any that fits into one: best fit, among a bounded number of rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from easyctx.data.rows import MIN_TOKENS

OPEN_ROWS = 256


@dataclass(frozen=True)
class Stretch:
    """`count` tokens of document number `document`, from its token `start` on."""

    document: int
    start: int
    count: int


@dataclass
class _OpenRow:
    room: int
    stretches: list[Stretch] = field(default_factory=list)


def pack(documents: Iterable[tuple[int, int]], row_length: int) -> Iterator[list[Stretch]]:
    """Rows of at most `row_length` tokens from (document, length) pairs, which may come in any number.

    A document goes into the open row that it leaves the least room in, or opens a new one; past OPEN_ROWS the fullest
    row is closed. One longer than a row fills rows of its own, and what is left over of it is packed as another
    document; a single token, which has nothing to predict within its document, is left out. The order of rows follows
    from the order of documents alone.
    """
    by_room: list[tuple[int, int]] = []  # (room, number of the row), sorted
    rows: dict[int, _OpenRow] = {}
    opened = 0
    for document, length in documents:
        whole = length // row_length * row_length
        for start in range(0, whole, row_length):
            yield [Stretch(document, start, row_length)]
        rest = length - whole
        if rest < MIN_TOKENS:
            continue
        place = bisect_left(by_room, (rest, -1))
        if place < len(by_room):
            _, number = by_room.pop(place)
        else:
            number, opened = opened, opened + 1
            rows[number] = _OpenRow(row_length)
        row = rows[number]
        row.stretches.append(Stretch(document, whole, rest))
        row.room -= rest
        if row.room == 0:
            yield rows.pop(number).stretches
            continue
        insort(by_room, (row.room, number))
        if len(by_room) > OPEN_ROWS:
            yield rows.pop(by_room.pop(0)[1]).stretches
    for number in sorted(rows):
        yield rows[number].stretches
