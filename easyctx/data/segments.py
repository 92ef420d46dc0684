"""Tokenise segment by segment, each distinct one once: text repeats its words, so most of it is looked up.

A segment is about a word with what leads up to it. Text is cut into segments only where no token of the tokenizers
that `pieces.can_cut` names reaches across and no match of their regular expressions looks across, so the ids of the
segments, joined, are those of the whole text. Such places are

- before a blank, tab or line end that follows anything but white space: their matches may begin with white space, but
  hold none after another character, but for line ends after signs. So a line end is no place to cut unless a letter or
  digit stands before it;
- between an ASCII letter and one of `,.;:!?`: a match that ends in letters ends with the last of them (an apostrophe
  could go on, as in "it's"; and tokens added to the vocabulary may hold other signs, as "<s>" does).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

SEGMENT = re.compile(
    r"\s*\S*?[A-Za-z](?=[,.;:!? \t\r\n])"  # up to a letter at such a place
    # Else up to white space, and on over white space that is no place to cut; Python's \s holds all that theirs does.
    r"|\s*\S+(?:(?:(?<![A-Za-z0-9])[\r\n]|[^\S \t\r\n])\s*\S*)*"
    r"|\s+"
)
# What is remembered is forgotten all at once past this: some 60 MB with Python's overhead.
REMEMBERED_SEGMENTS = 1 << 18
REMEMBERED_CHARACTERS = 1 << 23


class SegmentEncoder:
    """An `Encoder` for a Rust backend that passes `pieces.can_cut`; the more the words repeat, the faster."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._known: dict[str, bytes] = {}  # segment -> its ids as int32
        self._characters = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return SegmentEncoder, (self.backend,)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array [T] for each text."""
        if len(self._known) > REMEMBERED_SEGMENTS or self._characters > REMEMBERED_CHARACTERS:
            self._known.clear()
            self._characters = 0
        of_texts = [SEGMENT.findall(text) for text in texts]
        self._learn(list(set(chain.from_iterable(of_texts)).difference(self._known)))
        return [np.frombuffer(b"".join(map(self._known.__getitem__, s)), dtype=np.int32) for s in of_texts]

    def _learn(self, segments: list[str]) -> None:
        encodings = self.backend.encode_batch_fast(segments, add_special_tokens=False)
        for segment, encoding in zip(segments, encodings, strict=True):
            self._known[segment] = array("i", encoding.ids).tobytes()  # for few ids ten times as fast as numpy
            self._characters += len(segment)
