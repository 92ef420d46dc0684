"""Text to token ids with character offsets, the same for every tokenizer.

A prompt's ids are always those of its whole text. `encode_pieces` gets them without tokenising a million
tokens again for every prompt: long stretches of an already tokenised haystack are taken over, and only the
text around each border is tokenised anew, with enough haystack on both sides that the new tokens run into
the old ones again. For BPE one shared token with both its borders proves that the result is that of the
whole text (no merge crosses a border that neither neighbourhood crosses); we ask for `AGREEING` in a row.
Where they do not meet, the neighbourhood grows, at last to the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MARGIN = 2048  # characters of haystack tokenised anew on each side of a border
AGREEING = 16  # tokens in a row that must be the same in the old and the new tokens


@dataclass(frozen=True)
class Encoded:
    """Tokens of one text without special tokens: ids [n] int64, starts and ends [n] int64 in characters."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, first: int, last: int, shift: int) -> Encoded:
        """Tokens first..last-1 with offsets moved by `shift` characters."""
        return Encoded(self.ids[first:last], self.starts[first:last] + shift, self.ends[first:last] + shift)


@dataclass(frozen=True)
class Span:
    """Characters start..end-1 of a haystack."""

    start: int
    end: int


@dataclass(frozen=True)
class _Island:
    """Text that is tokenised anew. Its outer `MARGIN`s are haystack when it borders on taken-over tokens."""

    text: str
    first_span: Span | None  # haystack at the island's left end, None at the start of the prompt
    last_span: Span | None  # haystack at its right end, None at the end of the prompt


def leading_special_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text by its own policy (BOS or nothing).

    What it would put behind (EOS) is left out: a prompt ends with the answer.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValueError(f"the tokenizer's special tokens change the text itself: {plain} became {full} for 'a'")


class TextEncoder:
    """A Hugging Face tokenizer, fast or slow, behind one face. A slow one knows no offsets."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.has_offsets = bool(tokenizer.is_fast)
        self.leading = leading_special_ids(tokenizer)

    def encode(self, text: str) -> Encoded:
        """Token ids of `text` without special tokens; offsets are empty arrays for a slow tokenizer."""
        output = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self.has_offsets,
            verbose=False,
        )
        ids = np.asarray(output["input_ids"], dtype=np.int64)
        if not self.has_offsets:
            empty = np.zeros(0, dtype=np.int64)
            return Encoded(ids, empty, empty)
        offsets = np.asarray(output["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Encoded(ids, offsets[:, 0], offsets[:, 1])

    def decode(self, ids: Any) -> str:
        return self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def answer_span(self, encoded: Encoded, text: str, answer: str) -> tuple[int, int]:
        """First and one past the last token of `answer`, which ends `text`.

        A token that also holds the character before the answer (" 4") belongs to the span. A slow
        tokenizer has no offsets: the span is then the shortest tail that decodes to the answer.
        """
        if self.has_offsets:
            begin = len(text) - len(answer)
            # Tokens of nothing (an end at or before the answer's begin) are not the answer's.
            return int(np.argmax(encoded.ends > begin)), len(encoded)
        for start in range(len(encoded) - 1, -1, -1):
            if answer in self.decode(encoded.ids[start:]):
                return start, len(encoded)
        raise ValueError(f"the tokenizer does not decode the answer {answer!r} from its own tokens")


class PieceEncoder:
    """Encodes prompts made of new text and stretches of one haystack, which is tokenised once."""

    def __init__(self, encoder: TextEncoder, haystack: str, margin: int = MARGIN):
        self.encoder = encoder
        self.haystack = haystack
        self.tokens = encoder.encode(haystack)
        self.margin = margin
        self._islands: dict[str, Encoded] = {}

    def text_of(self, pieces: list[str | Span]) -> str:
        return "".join(piece if isinstance(piece, str) else self.haystack[piece.start : piece.end] for piece in pieces)

    def chars_of(self, start: int, num_tokens: int) -> int:
        """About how many characters from `start` on hold `num_tokens` tokens (exact up to borders)."""
        starts = self.tokens.starts
        if len(starts) == 0:  # a slow tokenizer knows no offsets
            return round(num_tokens * len(self.haystack) / max(len(self.tokens), 1))
        index = int(np.searchsorted(starts, start)) + num_tokens
        return int(starts[min(max(index, 0), len(starts) - 1)]) - start

    def encode_pieces(self, pieces: list[str | Span]) -> Encoded:
        """The tokens of the joined pieces, the same as `encode(text_of(pieces))`."""
        margin = self.margin
        while self.encoder.has_offsets:
            islands = self._split(pieces, margin)
            if len(islands) == 1:
                break
            joined = self._join(islands)
            if joined is not None:
                return joined
            margin *= 4
        return self.encoder.encode(self.text_of(pieces))

    def _split(self, pieces: list[str | Span], margin: int) -> list[_Island]:
        islands: list[_Island] = []
        text, first_span = "", None
        for piece in pieces:
            if isinstance(piece, str) or piece.end - piece.start < 3 * margin:
                text += self.text_of([piece])
                continue
            head, tail = Span(piece.start, piece.start + margin), Span(piece.end - margin, piece.end)
            islands.append(_Island(text + self.text_of([head]), first_span, head))
            text, first_span = self.text_of([tail]), tail
        islands.append(_Island(text, first_span, None))
        return islands

    def _join(self, islands: list[_Island]) -> Encoded | None:
        parts: list[Encoded] = []
        offset = 0  # where the island begins in the whole text
        old_first = 0  # the haystack token with which the taken-over stretch before this island begins
        for number, island in enumerate(islands):
            new = self._encode_island(island.text)
            first, last = 0, len(new)
            if island.first_span is not None:
                meeting = self._meet(new, island.first_span, shift=island.first_span.start)
                if meeting is None:
                    return None
                first, old_last = meeting
                parts.append(self.tokens.cut(old_first, old_last, offset - island.first_span.start))
            if island.last_span is not None:
                hay_begin = len(island.text) - self._length(island.last_span)
                meeting = self._meet(new, island.last_span, shift=island.last_span.start - hay_begin)
                if meeting is None:
                    return None
                last, old_first = meeting
            parts.append(new.cut(first, last, offset))
            if number + 1 < len(islands):
                gap_begin, gap_end = island.last_span, islands[number + 1].first_span
                assert gap_begin is not None
                assert gap_end is not None
                offset += len(island.text) + gap_end.start - gap_begin.end
        return Encoded(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.ends for part in parts]),
        )

    @staticmethod
    def _length(span: Span) -> int:
        return span.end - span.start

    def _encode_island(self, text: str) -> Encoded:
        if text not in self._islands:
            if len(self._islands) > 256:
                self._islands.clear()
            self._islands[text] = self.encoder.encode(text)
        return self._islands[text]

    def _meet(self, new: Encoded, span: Span, shift: int) -> tuple[int, int] | None:
        """First token past the middle of `span` from which new and old tokens are the same.

        `shift` takes a character of the new text to the haystack. Returns (new index, old index).
        """
        old = self.tokens
        middle = (span.start + span.end) // 2
        begin = int(np.searchsorted(new.starts, middle - shift))
        end = int(np.searchsorted(new.starts, span.end - shift)) - AGREEING
        for i in range(begin, end):
            if i and new.starts[i - 1] == new.starts[i]:
                continue  # several tokens of one character: meet only at the first
            j = int(np.searchsorted(old.starts, new.starts[i] + shift))
            same_ids = np.array_equal(new.ids[i : i + AGREEING], old.ids[j : j + AGREEING])
            if same_ids and np.array_equal(new.starts[i : i + AGREEING] + shift, old.starts[j : j + AGREEING]):
                return i, j
        return None
