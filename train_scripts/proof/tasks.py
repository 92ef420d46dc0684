"""Recall tasks as token ids: something is told, and asked for later. Only what can be recalled is learnt.

All texts are put together from pieces that were tokenised alone; the tokenizer of `start.py` allows that, and
tests/test_proof.py holds it against the tokens of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from easyctx.evals.needle_settings import ANSWER_STUB, NEEDLE, QUESTION
from easyctx.evals.numbers import CITIES
from easyctx.evals.tasks.longchat_prompts import LARGEST_NUMBER, LINES
from easyctx.evals.tasks.words import ADJECTIVES, NOUNS

# (what is told, what asks for it, up to the number). The first is what eval/needle.py asks by default.
FORMS = (
    (NEEDLE, QUESTION + ANSWER_STUB),
    (NEEDLE, " " + NEEDLE),
    ("The code of the {key} is {number}.", "\nQuestion: What is the code of the {key}?\nAnswer: "),
    ("[{key}={number}]", " [{key}="),
)
FORM_SHARES = (0.4, 0.2, 0.2, 0.2)
COPY_SHARE = 0.15  # of the tasks in a text: a passage that comes again
COPY_LENGTHS = (12, 48)
COPY_KNOWN = 4  # tokens of the second passage that tell which it is
DIGITS = (7, 7, 7, 7, 3, 4, 5, 6)  # eval/needle.py's 7 in half of the tasks
AFTER_BREAK = 0.15  # share of needles at the start of a line, as at depth 0


@dataclass(frozen=True)
class Piece:
    """ids [T] int32, and which of them are learnt."""

    ids: np.ndarray
    learnt: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pair:
    told: Piece
    asked: Piece


class Tasks:
    """Draws tasks in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encode = cache(self._encode)
        self.digits = np.array([self.encode(str(digit))[0] for digit in range(10)], dtype=np.int32)
        self._end = np.array([tokenizer.eos_token_id], dtype=np.int32)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def plain(self, text: str) -> Piece:
        ids = self.encode(text)
        return Piece(ids, np.zeros(len(ids), dtype=bool))

    def pair(self, rng: np.random.Generator, taken: set[str]) -> Pair:
        """A number told and asked for, under a key that is not in `taken`, which it joins."""
        form = rng.choice(len(FORMS), p=FORM_SHARES)
        told, asked = FORMS[form]
        if "{city}" in told and len(taken.intersection(CITIES)) > len(CITIES) // 2:
            told, asked = FORMS[2]
        key = CITIES[rng.integers(len(CITIES))] if "{city}" in told else _key(rng)
        while key in taken:
            key = CITIES[rng.integers(len(CITIES))] if "{city}" in told else _key(rng)
        taken.add(key)
        number = self._number(rng, int(rng.choice(DIGITS)))
        before = "\n" if rng.random() < AFTER_BREAK else " "
        return Pair(
            self._filled(before + told, key, number, learnt=False),
            self._filled(asked.split("{number}")[0] + "{number}\n", key, number, learnt=True),
        )

    def copy(self, rng: np.random.Generator, text: np.ndarray) -> Pair:
        """A passage that comes twice."""
        length = int(rng.integers(*COPY_LENGTHS))
        start = int(rng.integers(len(text) - length))
        ids = text[start : start + length].astype(np.int32)
        return Pair(Piece(ids, np.zeros(length, dtype=bool)), Piece(ids, np.arange(length) >= COPY_KNOWN))

    def line(self, key: str, number: str, *, learnt: bool) -> Piece:
        """A line of LongChat's record."""
        return self._filled(LINES["line"], key, self.digits[[int(digit) for digit in number]], learnt=learnt)

    def line_question(self, key: str, number: str) -> Piece:
        """The question about a line, and its answer, learnt with the end of the text after it."""
        digits = self.digits[[int(digit) for digit in number]]
        return self._filled(LINES["lines_question"] + "{number}", key, np.concatenate([digits, self._end]), learnt=True)

    def _number(self, rng: np.random.Generator, digits: int) -> np.ndarray:
        return self.digits[np.concatenate([rng.integers(1, 10, 1), rng.integers(0, 10, digits - 1)])]

    def _filled(self, template: str, key: str, number: np.ndarray, *, learnt: bool) -> Piece:
        """The template's tokens; `learnt` says whether the number is."""
        before, _, after = template.partition("{number}")
        head = self._with_key(before, key)
        tail = self.encode(after) if after else self._end[:0]
        ids = np.concatenate([head, number, tail])
        mask = np.zeros(len(ids), dtype=bool)
        mask[len(head) : len(head) + len(number)] = learnt
        return Piece(ids, mask)

    def _with_key(self, text: str, key: str) -> np.ndarray:
        """Keys of two words are tokenised by word, so that few different texts are."""
        if "-" not in key:
            return self.encode(text.replace("{city}", key).replace("{key}", key))
        adjective, _, noun = key.partition("-")
        parts = []
        pieces = text.split("{key}")
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            space = " " if not last and piece.endswith(" ") else ""
            text_alone = piece if last else piece.removesuffix(" ")
            if text_alone:
                parts.append(self.encode(text_alone))
            if not last:
                parts += [self.encode(space + adjective), self.encode("-"), self.encode(noun)]
        return np.concatenate(parts)


def _key(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def line_keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys, as `easyctx.evals.tasks.words.keys` makes them."""
    drawn = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
    return [f"{ADJECTIVES[place // len(NOUNS)]}-{NOUNS[place % len(NOUNS)]}" for place in drawn]


def line_number(rng: np.random.Generator) -> str:
    return str(rng.integers(1, LARGEST_NUMBER + 1))
