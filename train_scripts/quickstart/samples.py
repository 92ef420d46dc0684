"""Training samples: rows of text that hide one number and ask for it, as token ids (a byte is a token).

A row holds the needle ` [NUMBER=4821]` somewhere in running text and then one query or more, which are the same
words again: ` [NUMBER=` is what eval/needle.py ends its prompts with, and the digits behind it are the answer.
Rows with several queries are there because they teach more for the same compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train_scripts.quickstart.corpus import Text, to_ids

# As quickstart.sh gives them to eval/needle.py. Every byte of the stub is another one: the model tells the digits
# apart by what stands a fixed number of bytes before them, so the stub is longer than the number.
NEEDLE = "[NUMBER={number}]"
STUB = " [NUMBER="
DIGITS = 4

ITEM_LENGTH = len(" " + NEEDLE.format(number="0" * DIGITS))
# Shares of needles at the first byte and right before the last query, where chance would hardly ever put them.
AT_START, NEXT_TO_QUERY = 0.08, 0.12
MOST_LONG_QUERIES = 6  # of a row for the extension: a row of 2048 bytes costs much and has room for them
IGNORE = -100  # label without loss


@dataclass(frozen=True)
class Row:
    """ids [length] int64; which of them are digits of an answer, and which belong to needle or query at all."""

    ids: np.ndarray
    is_answer: np.ndarray
    is_item: np.ndarray


def needle_row(text: Text, rng: np.random.Generator, length: int, prompt_length: int, num_queries: int) -> Row:
    """A row of `length` bytes whose last query's answer ends at `prompt_length`; text goes on behind it.

    Raises ValueError where the prompt has no room for the needle and its queries, or the row for the prompt.
    """
    num_items = num_queries + 1
    filler = prompt_length + 1 - num_items * ITEM_LENGTH  # the closing bracket comes after the prompt
    if num_queries < 1 or filler < 0 or prompt_length > length:
        raise ValueError(
            f"a prompt of {prompt_length} bytes in a row of {length} cannot hold a needle and {num_queries} queries"
        )
    number = f"{rng.integers(10**DIGITS):0{DIGITS}d}"
    item = to_ids(" " + NEEDLE.format(number=number))
    start = int(rng.integers(len(text.ids) - length))
    running = text.ids[start : start + length]

    # Each item goes behind so many bytes of text, the last one behind all of `filler`.
    places = np.sort(rng.integers(filler + 1, size=num_items))
    places[rng.random(num_items) < NEXT_TO_QUERY] = filler
    if rng.random() < AT_START:
        places[0] = 0
    places[-1] = filler
    places.sort()
    parts = [part for piece in np.split(running, places)[:-1] for part in (piece, item)]
    ids = np.concatenate([*parts, running[filler:]])[:length]

    is_item, is_answer = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
    for order, begin in enumerate(places + ITEM_LENGTH * np.arange(num_items)):
        is_item[begin : begin + ITEM_LENGTH] = True
        if order > 0:
            is_answer[begin + len(STUB) : begin + len(STUB) + DIGITS] = True
    return Row(ids, is_answer, is_item)


def short_rows(
    text: Text, rng: np.random.Generator, length: int, num_rows: int, several: float
) -> tuple[np.ndarray, np.ndarray]:
    """ids and answer masks, both [num_rows, length], of rows that end with a query; a share `several` has 2 to 4."""
    most = min(4, (length + 1) // ITEM_LENGTH - 1)
    rows = []
    for _ in range(num_rows):
        num_queries = int(rng.integers(2, most + 1)) if most >= 2 and rng.random() < several else 1
        rows.append(needle_row(text, rng, length, length, num_queries))
    return np.stack([row.ids for row in rows]), np.stack([row.is_answer for row in rows])


def long_row(
    text: Text, rng: np.random.Generator, length: int, prompt_lengths: Sequence[int], num_text_labels: int
) -> dict[str, np.ndarray]:
    """`input_ids` and `labels` ([length] int64, not shifted) of a row for the extension.

    The prompt is between half of and all of one of `prompt_lengths`. Labels are the answers and some bytes of text
    from all over the row: all of the text would drown the few digits in the mean over tokens that is the loss.
    """
    longest = int(rng.choice(prompt_lengths))
    num_queries = int(rng.integers(1, MOST_LONG_QUERIES + 1))
    row = needle_row(text, rng, length, int(rng.integers(longest // 2 + 1, longest + 1)), num_queries)
    has_loss = np.zeros(length, dtype=bool)
    has_loss[rng.choice(length, num_text_labels, replace=False)] = True
    has_loss = (has_loss & ~row.is_item) | row.is_answer
    return {"input_ids": row.ids, "labels": np.where(has_loss, row.ids, IGNORE)}
