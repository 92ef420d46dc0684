"""Scores of generated answers against cases worked out by hand."""

import pytest

from easyctx.evals.stats import score_interval
from easyctx.evals.tasks.scores import (
    contains_topic,
    last_integer,
    string_match_all,
    string_match_part,
    token_f1,
)


@pytest.mark.parametrize(
    ("prediction", "references", "want"),
    [
        ("the old cat", ["old cat"], 1.0),
        ("The, OLD cat!", ["an old cat"], 1.0),
        ("cat dog", ["cat"], 2 / 3),  # precision 1/2, recall 1
        ("cat cat", ["cat dog bird"], 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),  # one cat counts once
        ("his mother's house", ["his mothers house", "x"], 1.0),  # the apostrophe goes, the words join
        ("cat", ["dog", "black cat"], 2 / 3),  # the best reference counts
        ("a theory", ["theory"], 1.0),  # only whole words are articles
        ("", ["cat"], 0.0),
        ("the a an", ["the"], 0.0),  # nothing is left to agree
    ],
)
def test_f1_of_words(prediction: str, references: list[str], want: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(want)


@pytest.mark.parametrize(
    ("prediction", "want"),
    [
        ("The number is 24169.", 1.0),
        ("<24169>", 1.0),
        ("24169 is in line 3", 0.0),  # the last integer counts
        ("line 3 holds 24,169", 0.0),
        ("024169", 1.0),
        ("2416", 0.0),
        ("241690", 0.0),
        ("none", 0.0),
    ],
)
def test_last_integer(prediction: str, want: float) -> None:
    assert last_integer(prediction, ["24169"]) == want


@pytest.mark.parametrize(
    ("prediction", "want"),
    [
        ("The topic was “the psychology of happiness”.", 1.0),
        ("THE PSYCHOLOGY  of\nhappiness!", 1.0),
        ("psychology and happiness", 0.0),
        ("", 0.0),
    ],
)
def test_topic_in_the_answer(prediction: str, want: float) -> None:
    assert contains_topic(prediction, ["The psychology of happiness"]) == want


def test_an_empty_topic_is_in_no_answer() -> None:
    assert contains_topic("anything", ["?!"]) == 0.0


def test_rulers_two_scores() -> None:
    assert string_match_all("12 and 34, not FIVE", ["12", "34", "five", "6"]) == 0.75
    assert string_match_all(" \x0012\x1f", ["12"]) == 1.0
    assert string_match_part("it was Paris", ["London", "paris"]) == 1.0
    assert string_match_part("it was Rome", ["London", "Paris"]) == 0.0


def test_interval_of_scores() -> None:
    assert score_interval([1.0] * 8 + [0.0] * 2) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    low, high = score_interval([0.25, 0.5, 0.75, 1.0]) or (0, 0)
    assert 0.25 < low < 0.625 < high < 1.0
    assert score_interval([0.5]) is None
