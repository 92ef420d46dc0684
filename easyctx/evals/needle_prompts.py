"""Needle-in-a-haystack prompts: text and tokens, no model.

A prompt is `leading special tokens + prefix + haystack with the needle in it + question + answer stub +
answer`. Its length counts all of that, the answer with its last token included: the model is fed exactly
`length` tokens, and the prediction after the last one is not used.

A prompt depends on (settings, seed, length, depth, sample) and on nothing else, so every node builds the
same one, and a bigger grid holds the prompts of a smaller one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from easyctx.evals.encoding import Encoded, Span, TextEncoder
from easyctx.evals.haystack import Haystack, Insertion, fit_count
from easyctx.evals.needle_settings import Cell, NeedleSettings, number_of, place_of
from easyctx.evals.numbers import CITIES


@dataclass(frozen=True)
class Prompt:
    """ids [length] int64; the answer is ids[answer_start:]; the needle begins with token needle_start."""

    cell: Cell
    ids: np.ndarray
    answer_start: int
    needle_start: int | None
    answer: str
    text: str

    @property
    def hash(self) -> str:
        data = self.ids.astype("<i8").tobytes() + self.answer_start.to_bytes(8, "little")
        return hashlib.sha256(data).hexdigest()[:16]


class NeedlePrompts:
    """Builds the prompt of any cell up to `max_length` tokens."""

    def __init__(self, encoder: TextEncoder, haystack: str, max_length: int, settings: NeedleSettings):
        self.settings = settings
        self.max_length = max_length
        self.encoder = encoder
        spare = len(encoder.encode(haystack[: 1 << 22])) if settings.shift_haystack else 0
        self.haystack = Haystack(encoder, haystack, max_length + spare)
        self._trunk: tuple[int, np.ndarray] | None = None  # the newest, by where its haystack begins

    def check_length(self, length: int) -> None:
        """Raises ValueError where a prompt of `length` tokens would have no room for a haystack."""
        several = self.settings.needles
        needed = max(self._overhead([city] * several, ["8" * self.settings.digits] * several) for city in CITIES)
        if length <= needed:
            raise ValueError(
                f"--lengths has {length}, but prefix, needle, question and answer alone take {needed}; "
                f"give at least {needed + 1} tokens or shorter templates"
            )

    def build(self, cell: Cell) -> Prompt:
        """The prompt of exactly `cell.length` tokens."""
        settings, haystack = self.settings, self.haystack
        at = place_of(settings, cell, self.max_length)
        owner = f"{cell.length} {cell.depth:.1f}" if at is None else f"at {at}"
        rng = random.Random(f"needle {settings.seed} {owner} {cell.sample}")
        number = number_of(settings, cell, self.max_length)
        cities = rng.sample(CITIES, settings.distractors + settings.needles)
        own, others = cities[: settings.needles], cities[settings.needles :]
        room = cell.length - self._overhead(own, [number] * len(own))
        if room <= 0:
            self.check_length(cell.length)
        start = self._haystack_start(cell.sample)
        planned = haystack.chars_of(start, room)
        place = haystack.place(start, planned, cell.depth / 100) if at is None else haystack.place_after(start, at)
        distractors = [
            Insertion(
                haystack.place(start, planned, rng.random()),
                self._fill(settings.needle, city, self._other_number(rng, number)),
            )
            for city in others
        ]
        numbers = [number]
        while len(numbers) < len(own):
            numbers.append(self._other_number(rng, *numbers))
        answer = ", ".join(numbers)
        tail = self._fill(settings.question + settings.answer_stub, ", ".join(own), answer) + answer
        depths = (cell.depth / 100 + (1 - cell.depth / 100) * i / len(own) for i in range(1, len(own)))
        places = [place, *(haystack.place(start, planned, depth) for depth in depths)]
        texts = [self._fill(settings.needle, *pair) for pair in zip(own, numbers, strict=True)]

        def pieces(num_chars: int, filler: str) -> tuple[list[str | Span], int]:
            end = start + num_chars
            # What lies at the end then stays last, however the haystack is cut.
            needles = [
                Insertion(end if at >= start + planned else at, text) for at, text in zip(places, texts, strict=True)
            ]
            tight = not settings.question
            laid_out, begins = haystack.insert(
                start, end, [*distractors, *needles], settings.prefix, filler + tail, tight=tight
            )
            return laid_out, begins[len(distractors)]

        def count(num_chars: int, filler: str) -> int:
            return len(self._encode(pieces(num_chars, filler)[0])) + len(self.encoder.leading)

        num_chars, filler = fit_count(
            count,
            target=cell.length,
            guess=planned,
            move=lambda chars, tokens: chars + haystack.chars_of(start + chars, tokens),
            limit=len(haystack.text) - start,
        )
        laid_out, needle_char = pieces(num_chars, filler)
        return self._finish(cell, self._encode(laid_out), laid_out, needle_char, answer)

    def trunk(self, sample: int) -> np.ndarray:
        """Ids int64 of a text without a needle: what the sample's prompts are like up to their first difference."""
        start = self._haystack_start(sample)
        if self._trunk is None or self._trunk[0] != start:
            end = start + self.haystack.chars_of(start, self.max_length)
            encoded = self._encode([self.settings.prefix, Span(start, end)])
            ids = np.concatenate([np.asarray(self.encoder.leading, dtype=np.int64), encoded.ids])
            self._trunk = start, ids[: self.max_length]
        return self._trunk[1]

    def together(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The cells in groups, in their order, those of a group sharing a needle and all that lies before it."""
        groups: dict[object, list[Cell]] = {}
        for cell in cells:
            place = place_of(self.settings, cell, self.max_length)
            groups.setdefault(cell if place is None else (place, cell.sample), []).append(cell)
        return list(groups.values())

    def _finish(self, cell: Cell, encoded: Encoded, pieces: list[str | Span], needle_char: int, answer: str) -> Prompt:
        text = self.haystack.pieces.text_of(pieces)
        leading = self.encoder.leading
        answer_start, answer_end = self.encoder.answer_span(encoded, text, answer)
        spelled = self.encoder.decode(encoded.ids[answer_start:answer_end])
        if answer not in spelled:
            raise ValueError(f"the tokenizer cannot spell the answer: {answer} came back as {spelled!r}")
        needle_start = None
        if self.encoder.has_offsets:
            needle_start = len(leading) + int(np.argmax(encoded.ends > needle_char))
        return Prompt(
            cell=cell,
            ids=np.concatenate([np.asarray(leading, dtype=np.int64), encoded.ids]),
            answer_start=len(leading) + answer_start,
            needle_start=needle_start,
            answer=answer,
            text=text,
        )

    def _encode(self, pieces: list[str | Span]) -> Encoded:
        return self.haystack.pieces.encode_pieces(pieces)

    def _overhead(self, cities: list[str], numbers: list[str]) -> int:
        settings = self.settings
        needle = len(self.encoder.encode(self._fill(settings.needle, cities[0], numbers[0])))
        asked = self._fill(settings.question + settings.answer_stub + "{number}", ", ".join(cities), ", ".join(numbers))
        parts = len(self.encoder.encode(settings.prefix)) + needle + len(self.encoder.encode(asked))
        return parts + len(self.encoder.leading) + (settings.distractors + settings.needles - 1) * (needle + 2)

    def _haystack_start(self, sample: int) -> int:
        """Where the haystack of this sample begins: the text's start, or a sentence by seed and sample."""
        if not self.settings.shift_haystack:
            return 0
        rng = random.Random(f"haystack {self.settings.seed} {sample}")
        return self.haystack.sentence_end(rng.randrange(min(self.haystack.text_length, 1 << 22)))

    def _other_number(self, rng: random.Random, *numbers: str) -> str:
        low = 10 ** (self.settings.digits - 1)
        while True:
            other = str(rng.randrange(low, 10 * low))
            if other not in numbers:
                return other

    @staticmethod
    def _fill(template: str, city: str, number: str) -> str:
        return template.replace("{city}", city).replace("{number}", number)
