"""What a needle grid is made of: its settings, its cells, and which needle belongs to a cell.

With `depth_by` "place" or "position" a needle (its number and city) belongs to its place, counted in tokens from
the start, and not to the cell: cells whose needles lie at one place have one text up to where the shorter one ends,
which is then computed once for all of them (`easyctx.evals.trunk`). Two depths of one length never have the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from easyctx.evals.numbers import CITIES, needle_number, place_number

PREFIX = "Below is a long book with a secret somewhere in it. Read all of it with care.\n<book>\n"
NEEDLE = "The special magic {city} number is {number}."
QUESTION = "\n</book>\nUse what the book says.\nQuestion: What is the special magic {city} number?\n"
ANSWER_STUB = "Answer: The special magic {city} number is "
# Where several needles are asked for, {city} lists their cities, and the answer their numbers.
QUESTION_FOR_SEVERAL = (
    "\n</book>\nUse what the book says.\nQuestion: What are the special magic numbers of {city}, in this order?\n"
)
ANSWER_STUB_FOR_SEVERAL = "Answer: The special magic numbers of {city} are, in this order, "
PLACE_STEP = 8  # tokens; half of one length and a quarter of its double are one place, however they were rounded
PLACES_FROM = 4000  # tokens; of a shorter prompt the template is too much for depths to be counted in its tokens
DEPTHS_BY = {
    "fraction": "of each prompt, every cell with a needle of its own",
    "place": "of each prompt; in prompts of other lengths whose needle lies at the same token it is the same one",
    "position": "of the longest length: needles lie at the same few positions in all lengths that reach there",
}


@dataclass(frozen=True)
class NeedleSettings:
    """What all prompts of a run share. The templates may hold {city}; the needle must hold {number}.

    Of several `needles` the first lies at the cell's depth, the others evenly between it and the end; all their
    numbers are asked for, and only all of them are right.
    """

    prefix: str = PREFIX
    needle: str = NEEDLE
    question: str = QUESTION
    answer_stub: str = ANSWER_STUB
    digits: int = 7
    distractors: int = 0
    seed: int = 42
    shift_haystack: bool = False
    depth_by: str = "fraction"
    needles: int = 1

    def __post_init__(self) -> None:
        if "{number}" not in self.needle:
            raise ValueError(f"the needle {self.needle!r} has no {{number}} in it")
        asks = "{city}" in self.question + self.answer_stub
        if asks and "{city}" not in self.needle:
            raise ValueError(f"the question names a {{city}}, but the needle {self.needle!r} does not")
        if self.depth_by not in DEPTHS_BY:
            raise ValueError(f"--depth-by is {self.depth_by!r}; choose one of {', '.join(DEPTHS_BY)}")
        if (self.distractors or self.needles != 1) and self.depth_by != "fraction":
            name, value = ("distractors", self.distractors) if self.distractors else ("needles", self.needles)
            raise ValueError(
                f"--{name} {value} lie at fractions of each prompt, so prompts of --depth-by "
                f"{self.depth_by} would have nothing in common: leave one of the two out"
            )
        if not 1 <= self.digits <= 15:
            raise ValueError(f"--digits is {self.digits}; give 1 to 15")
        if self.needles < 1 or self.distractors < 0 or self.needles + self.distractors > len(CITIES):
            raise ValueError(
                f"--needles is {self.needles} and --distractors {self.distractors}; give at least 1 and 0, together "
                f"at most {len(CITIES)}"
            )
        if self.needles + self.distractors > 1 and not (asks and "{city}" in self.needle):
            raise ValueError(
                f"--needles {self.needles} and --distractors {self.distractors} need {{city}} in the needle and in the "
                "question or answer stub: nothing else tells one needle from another"
            )


@dataclass(frozen=True)
class Cell:
    """One prompt of the grid: tokens, percent (a multiple of 0.1) and number of the sample."""

    length: int
    depth: float
    sample: int

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 100:
            raise ValueError(f"the depth {self.depth} is outside 0 to 100 percent")


def default_depth_by(lengths: Sequence[int], depths: Sequence[float], *, one_needle: bool) -> str:
    """ "place" where it differs from "fraction" in nothing but the price: numbers that prompts have in common."""
    gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(depths))]
    apart = all(gap / 100 * min(lengths) > PLACE_STEP for gap in gaps)
    return "place" if one_needle and apart and min(lengths) >= PLACES_FROM else "fraction"


def place_of(settings: NeedleSettings, cell: Cell, max_length: int) -> int | None:
    """About how many tokens from the start the needle lies, where that says which needle it is."""
    if settings.depth_by == "fraction":
        return None
    tokens = cell.depth / 100 * (cell.length if settings.depth_by == "place" else max_length)
    return round(tokens / PLACE_STEP) * PLACE_STEP


def number_of(settings: NeedleSettings, cell: Cell, max_length: int) -> str:
    """The number that a cell hides."""
    place = place_of(settings, cell, max_length)
    if place is None:
        return needle_number(settings.seed, settings.digits, cell.length, cell.depth, cell.sample)
    return place_number(settings.seed, settings.digits, place // PLACE_STEP, cell.sample)


def check_numbers(settings: NeedleSettings, cells: Sequence[Cell]) -> None:
    """Raises ValueError where two needles, or two depths of one length, would have the same number."""
    owners: dict[str, tuple[object, Cell]] = {}
    prompts: dict[tuple[int, str], Cell] = {}
    max_length = max(cell.length for cell in cells)
    for cell in cells:
        place = place_of(settings, cell, max_length)
        needle = cell if place is None else (place, cell.sample)
        number = number_of(settings, cell, max_length)
        owner, first = owners.setdefault(number, (needle, cell))
        if owner != needle:
            raise ValueError(
                f"{cell} and {first} would hide the same number {number}: {settings.digits} digits "
                f"are too few for this grid; give --digits {settings.digits + 1}"
            )
        other = prompts.setdefault((cell.length, number), cell)
        if other != cell:
            raise ValueError(
                f"the depths {other.depth:g}% and {cell.depth:g}% of {cell.length} tokens are one place for --depth-by "
                f"{settings.depth_by}, which counts in steps of {PLACE_STEP} tokens; give fewer depths, or "
                "--depth-by fraction"
            )
