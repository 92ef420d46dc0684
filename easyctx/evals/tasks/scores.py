"""Scores of one generated answer against its references, all from 0 to 1. Pure functions of text."""

from __future__ import annotations

import re
import string
from collections import Counter

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def token_f1(prediction: str, references: list[str]) -> float:
    """F1 of the multisets of words, the best over the references (SQuAD's measure, Rajpurkar et al. 2016).

    Words are in lower case, without ASCII punctuation and English articles.
    """
    words = Counter(_answer_words(prediction))
    return max(_f1(words, Counter(_answer_words(reference))) for reference in references)


def last_integer(prediction: str, references: list[str]) -> float:
    """1 where the last run of digits in the answer is the reference as a number, else 0."""
    numbers = re.findall(r"\d+", prediction)
    return float(bool(numbers) and any(int(numbers[-1]) == int(reference) for reference in references))


def contains_topic(prediction: str, references: list[str]) -> float:
    """1 where a reference stands in the answer, both in lower case, without punctuation, with single spaces."""
    answer = _plain(prediction)
    return float(any(wanted and wanted in answer for wanted in map(_plain, references)))


def string_match_all(prediction: str, references: list[str]) -> float:
    """The share of references that stand in the answer, in any case: RULER's score of all but its QA tasks."""
    found = _found(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: list[str]) -> float:
    """1 where any reference stands in the answer, in any case: RULER's score of its QA tasks."""
    return float(any(_found(prediction, references)))


def _found(prediction: str, references: list[str]) -> list[bool]:
    answer = UNPRINTABLE.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in answer for reference in references]


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(PUNCTUATION).split())


def _answer_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _f1(prediction: Counter[str], reference: Counter[str]) -> float:
    same = (prediction & reference).total()
    if same == 0:
        return 0.0
    precision, recall = same / prediction.total(), same / reference.total()
    return 2 * precision * recall / (precision + recall)
