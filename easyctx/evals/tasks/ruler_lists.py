"""RULER's two tasks of counting: common words in a list, frequent words in a coded text."""

from __future__ import annotations

import random
import string
from dataclasses import replace

from easyctx.evals.tasks.ruler_draft import Draft, spare_units
from easyctx.evals.tasks.ruler_tasks import CommonWords, FrequentWords
from easyctx.evals.tasks.templates import fill
from easyctx.evals.tasks.words import NUM_WORDS, words

EXAMPLE = CommonWords(common=10, often=3, seldom=1)
EXAMPLE_WORDS = 10
DOTS = "...."


def common_words_draft(spec: CommonWords, num_units: int, seed: str, templates: dict[str, str]) -> Draft:
    """A numbered list of words after one worked example; a unit is one word that is not common."""
    example = _numbered_list(EXAMPLE, EXAMPLE_WORDS, f"example {seed}", templates)
    asked = _numbered_list(spec, num_units, seed, templates)
    shown = example.context + example.question + example.answer_prefix + " " + " ".join(example.references)
    return replace(asked, context=shown + "\n\n" + asked.context)


def _numbered_list(spec: CommonWords, num_units: int, seed: str, templates: dict[str, str]) -> Draft:
    num_spare = spec.seldom * spare_units(num_units)
    num_others = num_units + num_spare
    # The words are drawn apart, so that one more unit leaves the common ones, and the length of the rest, as they are.
    compound = num_others + spec.common > NUM_WORDS
    common = words(random.Random(f"common words {seed}"), spec.common, compound)
    drawn = words(random.Random(f"seldom words {seed}"), num_others + spec.common, compound)
    others = [word for word in drawn if word not in common][:num_others]
    entries = common * spec.often + others[:num_units] * spec.seldom
    random.Random(f"order {seed}").shuffle(entries)
    numbered = [f"{number}. {word} " for number, word in enumerate([*entries, *others[num_units:]], start=1)]
    return Draft(
        context=templates["cwe_intro"] + "".join(numbered[: len(entries)]),
        question=fill(templates["cwe_question"], count=spec.common),
        answer_prefix=fill(templates["cwe_answer"], count=spec.common),
        references=common,
        filler="".join(numbered[len(entries) :]),
    )


def frequent_words_draft(
    spec: FrequentWords, num_units: int, vocabulary: int, seed: str, templates: dict[str, str]
) -> Draft:
    """A text of coded words; a unit is one word of it. The most frequent "word" is dots."""
    rng = random.Random(f"coded words {seed}")
    coded: dict[str, None] = {}
    while len(coded) < vocabulary:
        coded["".join(rng.choices(string.ascii_lowercase, k=spec.letters))] = None
    ranked = [DOTS, *coded]
    counts = zipf_counts(len(ranked), num_units, spec.alpha)
    text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Draft(
        context=templates["fwe_intro"] + " ".join(text),
        question=fill(templates["fwe_question"], count=spec.asked),
        answer_prefix=fill(templates["fwe_answer"], count=spec.asked),
        references=ranked[1 : spec.asked + 1],
        filler=f" {DOTS}" * spare_units(num_units),
    )


def zipf_counts(num_ranks: int, total: int, alpha: float) -> list[int]:
    """How often each rank comes in about `total` words: in proportion to 1 / rank**alpha, rounded down."""
    shares = [rank**-alpha for rank in range(1, num_ranks + 1)]
    scale = total / sum(shares)
    return [int(share * scale) for share in shares]


def fewest_frequent_words(spec: FrequentWords, vocabulary: int) -> int:
    """The fewest words of a text in which the ranks that are asked for are told apart from the next."""
    total = 16
    while True:
        counts = zipf_counts(vocabulary + 1, total, spec.alpha)
        if all(counts[rank] > counts[rank + 1] for rank in range(spec.asked + 1)):
            return total
        total += 8
