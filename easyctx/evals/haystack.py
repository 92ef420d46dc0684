"""A haystack that is tokenised once, where things may be put into it, and how it is cut to a token count."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from easyctx.evals.encoding import PieceEncoder, Span, TextEncoder

# Latin stops with closing quotes before a space, Chinese and Japanese stops, or the end of a paragraph.
SENTENCE_END = re.compile(
    r"[.!?\u2026]+[\"'\u201d\u2019\u00bb)\]]*(?=\s)"
    r"|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019\uff09]*"
    r"|(?=\n\s*\n)"
)
WORD_END = re.compile(r"(?<=\S)(?=\s)")
MAX_OVERSHOOT = 0.1  # of the haystack; a sentence that ends later than this past the depth is not waited for
MAX_WAIT = 1000  # characters; the same where the depth is a position
SPARE_TOKENS = 4096  # so that the end of the tokenised text is never near the end of a prompt's haystack
FILLERS = (" .", ".", "\n", " -")  # what makes up for counts that no cut of the haystack gives


@dataclass(frozen=True)
class Insertion:
    at: int  # character of the haystack
    text: str


class Haystack:
    """Text repeated to at least `num_tokens` tokens, with its sentence ends by character."""

    def __init__(self, encoder: TextEncoder, text: str, num_tokens: int):
        self.text_length = len(text)  # of one repetition
        wanted = num_tokens + SPARE_TOKENS
        num_chars = 4 * wanted
        while True:
            self.text = self._repeat(text, num_chars)
            self.pieces = PieceEncoder(encoder, self.text)
            if len(self.pieces.tokens) >= wanted:
                break
            num_chars = int(1.1 * num_chars * wanted / len(self.pieces.tokens)) + 1
        self._sentence_ends = [match.end() for match in SENTENCE_END.finditer(self.text)]

    @staticmethod
    def _repeat(text: str, num_chars: int) -> str:
        unit = text + "\n\n"
        return (unit * (num_chars // len(unit) + 1))[:num_chars]

    def sentence_end(self, at: int) -> int:
        """The first sentence end at or past character `at`; the end of the text where there is none."""
        index = bisect_left(self._sentence_ends, at)
        return self._sentence_ends[index] if index < len(self._sentence_ends) else len(self.text)

    def place(self, start: int, num_chars: int, depth: float) -> int:
        """Where to put something into characters start..start+num_chars at `depth` (0 to 1).

        After the first sentence end at or past the depth. The borders of the stretch count as sentence
        ends. Where the sentence ends more than MAX_OVERSHOOT of the stretch later, after the word.
        Returns a character of the haystack, `start + num_chars` at depth 1.
        """
        end = start + num_chars
        target = start + round(depth * num_chars)
        if target <= start or target >= end:
            return min(max(target, start), end)
        found = min(self.sentence_end(target), end)
        if found - target <= MAX_OVERSHOOT * num_chars:
            return found
        word_end = WORD_END.search(self.text, target)
        return min(word_end.end(), end) if word_end else end

    def place_after(self, start: int, num_tokens: int) -> int:
        """Where to put something about `num_tokens` tokens past character `start`, whatever follows.

        After the first sentence end at or past there; after the word, where the sentence goes on for more than
        MAX_WAIT characters. `start` itself for 0 tokens.
        """
        if num_tokens == 0:
            return start
        target = start + self.chars_of(start, num_tokens)
        found = self.sentence_end(target)
        if found - target <= MAX_WAIT:
            return found
        word_end = WORD_END.search(self.text, target)
        return word_end.end() if word_end else len(self.text)

    def chars_of(self, start: int, num_tokens: int) -> int:
        """About how many characters from `start` on hold `num_tokens` tokens (exact up to borders)."""
        return self.pieces.chars_of(start, num_tokens)

    def insert(
        self, start: int, end: int, insertions: list[Insertion], before: str, after: str, *, tight: bool = False
    ) -> tuple[list[str | Span], list[int]]:
        """Pieces of `before` + characters start..end-1 with the insertions in them + `after`.

        An insertion gets a space on each side where there is none (`tight`: not before `after`); of two at one
        place the first given comes first. Also returns the character of the whole at which each begins.
        """
        pieces: list[str | Span] = [before]
        length, last, here = len(before), before[-1:], start
        begins = [0] * len(insertions)
        for number in sorted(range(len(insertions)), key=lambda number: min(insertions[number].at, end)):
            at = min(insertions[number].at, end)
            if at > here:
                pieces.append(Span(here, at))
                length += at - here
                last = self.text[at - 1]
                here = at
            space = " " if last and not last.isspace() else ""
            following = self.text[here] if here < end else after[:1]
            closing = "" if following.isspace() or (here >= end and tight) else " "
            begins[number] = length + len(space)
            spaced = space + insertions[number].text + closing
            pieces.append(spaced)
            length += len(spaced)
            last = spaced[-1]
        if end > here:
            pieces.append(Span(here, end))
        pieces.append(after)
        return pieces, begins


def fit_count(
    count: Callable[[int, str], int],
    target: int,
    guess: int,
    move: Callable[[int, int], int],
    limit: int,
) -> tuple[int, str]:
    """Finds (number of characters, filler) for which `count(num_chars, filler)` is exactly `target`.

    `move(num_chars, tokens)` is the number of characters with about that many tokens more. Where no cut
    gives the count (a character of three byte tokens), a short filler is appended.
    """
    seen: dict[int, int] = {}

    def length_at(num_chars: int) -> int:
        if num_chars not in seen:
            seen[num_chars] = count(num_chars, "")
        return seen[num_chars]

    current = min(max(guess, 0), limit)
    for _ in range(12):
        missing = target - length_at(current)
        if missing == 0:
            return current, ""
        following = min(max(move(current, missing), 0), limit)
        if following in seen:
            break
        current = following
    best = min(seen, key=lambda num_chars: abs(seen[num_chars] - target))
    for distance in range(1, 25):
        for near in (best - distance, best + distance):
            if 0 <= near <= limit and length_at(near) == target:
                return near, ""
    short = [num_chars for num_chars in seen if 0 < target - seen[num_chars] <= 16]
    for num_chars in sorted(short, key=lambda num_chars: (target - seen[num_chars], num_chars)):
        for filler in FILLERS:
            for repeats in range(1, target - seen[num_chars] + 1):
                if count(num_chars, filler * repeats) == target:
                    return num_chars, filler * repeats
    raise ValueError(
        f"no cut of the haystack gives exactly {target} tokens; the nearest are {sorted(set(seen.values()))}"
    )
