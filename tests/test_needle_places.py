"""Where needles are hidden: one place is one needle at every length, and no two places hide the same number."""

import re

import pytest
import torch

from easyctx.evals import needle
from easyctx.evals.needle_prompts import NeedlePrompts
from easyctx.evals.needle_settings import Cell, NeedleSettings, check_numbers, number_of
from easyctx.evals.numbers import place_number
from easyctx.evals.trunk import common_length
from tests.eval_helpers import encoder, english

# Of the prompts before they were run together: they must not change.
OLD_PROMPTS = {(300, 50.0): "531aaaa2bf81ffb6", (6000, 10.0): "3ee40a1a5f0b2ab3"}


@pytest.mark.parametrize("cell", sorted(OLD_PROMPTS))
def test_depth_by_fraction_makes_the_prompts_that_it_made_before(cell: tuple[int, float]) -> None:
    prompts = NeedlePrompts(encoder("bytes"), english(), 6000, NeedleSettings())
    assert prompts.build(Cell(*cell, 0)).hash == OLD_PROMPTS[cell]


@pytest.mark.parametrize("name", ["byte_bpe", "metaspace_bpe", "unigram", "slow"])
@pytest.mark.parametrize("depth_by", ["place", "position"])
def test_needles_at_one_place_are_one_needle(name: str, depth_by: str) -> None:
    settings = NeedleSettings(depth_by=depth_by)
    prompts = NeedlePrompts(encoder(name), english(), 2000, settings)
    # A quarter of 2,000, half of 1,000, or the same fraction of the longest: 500 tokens from the start.
    cells = [Cell(2000, 25.0, 0), Cell(1000, 50.0 if depth_by == "place" else 25.0, 0)]
    longer, shorter = (prompts.build(cell) for cell in cells)
    assert (len(longer.ids), len(shorter.ids)) == (2000, 1000)
    assert longer.answer == shorter.answer
    ids = [torch.from_numpy(prompt.ids) for prompt in (longer, shorter)]
    assert common_length(*ids) > 800
    with_trunk = common_length(ids[0], torch.from_numpy(prompts.trunk(0)))
    assert 450 < with_trunk < 750
    if name != "slow":
        assert abs(with_trunk - longer.needle_start) <= 2
    found = [re.search(r"magic \w+ number is \d{7}\.", prompt.text).group() for prompt in (longer, shorter)]
    assert found[0] == found[1]
    assert prompts.together([*cells, Cell(2000, 50.0, 0)]) == [cells, [Cell(2000, 50.0, 0)]]
    assert prompts.build(Cell(2000, 25.0, 1)).answer != longer.answer


def test_numbers_of_places_differ() -> None:
    lengths = [round(131072 * (i + 1) / 20) for i in range(20)]
    for depth_by in ("place", "position"):
        settings = NeedleSettings(depth_by=depth_by)
        cells = [Cell(length, 10.0 * j, sample) for length in lengths for j in range(11) for sample in range(2)]
        check_numbers(settings, cells)
        numbers = {number_of(settings, cell, lengths[-1]) for cell in cells}
        if depth_by == "position":
            assert len(numbers) == 22
        else:  # 101 different products of 0 to 10 and 1 to 20; lengths are rounded, which parts a place or two
            assert 202 <= len(numbers) <= 206


def test_places_are_told_apart_with_few_digits() -> None:
    cells = [Cell(4000 * 2**i, 5.0 * j, sample) for i in range(2) for j in range(21) for sample in range(8)]
    check_numbers(NeedleSettings(depth_by="place", digits=4), cells)
    numbers = {place_number(1, 4, place, sample) for place in range(100) for sample in range(24)}
    assert len(numbers) == 2400
    with pytest.raises(ValueError, match="would hide the same number"):
        check_numbers(NeedleSettings(depth_by="place", digits=2), cells)


def test_two_depths_of_a_length_are_not_one_place() -> None:
    cells = [Cell(500, depth, 0) for depth in (10.0, 10.2)]
    with pytest.raises(ValueError, match=r"10% and 10.2% of 500 tokens are one place .* --depth-by fraction"):
        check_numbers(NeedleSettings(depth_by="place"), cells)
    check_numbers(NeedleSettings(depth_by="fraction"), cells)


@pytest.mark.parametrize(
    ("flags", "depth_by"),
    [
        (["--lengths", "4000", "8000"], "place"),
        (["--lengths", "3999", "8000"], "fraction"),
        (["--lengths", "4000", "--depths", "1001"], "fraction"),  # four tokens apart
        (["--lengths", "4000", "--needles", "2"], "fraction"),
        (["--lengths", "4000", "--distractors", "1"], "fraction"),
        (["--lengths", "4000", "--depth-by", "fraction"], "fraction"),
        (["--lengths", "400", "--depth-by", "place"], "place"),
    ],
)
def test_the_default_shares_needles_where_that_changes_nothing_else(flags: list[str], depth_by: str) -> None:
    args = needle.make_parser().parse_args([*flags, "--output", "out"])
    assert needle.settings_of(args).depth_by == depth_by


def test_by_place_depths_are_those_by_fraction() -> None:
    """At the shortest length that the default takes, the needle lies within a sentence of where fraction puts it."""
    cells = [Cell(4000, 10.0 * j, 0) for j in range(11)]
    starts = []
    for depth_by in ("place", "fraction"):
        prompts = NeedlePrompts(encoder("byte_bpe"), english(), 4000, NeedleSettings(depth_by=depth_by))
        starts.append([prompts.build(cell).needle_start or 0 for cell in cells])
    assert all(abs(a - b) <= 200 for a, b in zip(*starts, strict=True))
    assert starts[0] == sorted(set(starts[0]))
