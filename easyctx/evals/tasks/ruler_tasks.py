"""RULER's 13 tasks as NVIDIA configures them, and the wording of their prompts.

After Hsieh et al., "RULER: What's the real context size of your long-context language models?", arXiv
2404.06654, and NVIDIA/RULER's configuration. What is asked, hidden and counted is theirs; the wording, words
and noise are our own, so scores are close to but not the same as with NVIDIA's prompts: `--templates` takes
other wording, `--data` takes prompts that NVIDIA's scripts prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from easyctx.evals.tasks.scores import string_match_all, string_match_part


@dataclass(frozen=True)
class Needles:
    """What a needle task hides where: `keys` sentences or groups of them, of which `queries` are asked."""

    haystack: str  # noise, essay, or needles: more needles, none of them asked for
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True)
class Tracking:
    """A variable is given a value, and `hops` further ones each that of the one before."""

    hops: int = 4


@dataclass(frozen=True)
class CommonWords:
    """A list in which `common` words come `often` times each, all others `seldom` times."""

    common: int = 10
    often: int = 30
    seldom: int = 3


@dataclass(frozen=True)
class FrequentWords:
    """Coded words with frequencies by Zipf's law; the three most frequent after the noise are asked."""

    alpha: float = 2.0
    asked: int = 3
    letters: int = 6
    tokens_a_word: int = 50  # of the prompt's length for each word of the vocabulary


@dataclass(frozen=True)
class Reading:
    """A question on paragraphs of which most are about something else."""

    dataset: str  # squad or hotpotqa


@dataclass(frozen=True)
class RulerTask:
    """`max_new_tokens` count as part of the length, as they do for NVIDIA."""

    spec: Needles | Tracking | CommonWords | FrequentWords | Reading
    max_new_tokens: int
    score: Callable[[str, list[str]], float] = string_match_all


TASKS = {
    "niah_single_1": RulerTask(Needles("noise"), 128),
    "niah_single_2": RulerTask(Needles("essay"), 128),
    "niah_single_3": RulerTask(Needles("essay", value="uuids"), 128),
    "niah_multikey_1": RulerTask(Needles("essay", keys=4), 128),
    "niah_multikey_2": RulerTask(Needles("needles"), 128),
    "niah_multikey_3": RulerTask(Needles("needles", key="uuids", value="uuids"), 128),
    "niah_multivalue": RulerTask(Needles("essay", values=4), 128),
    "niah_multiquery": RulerTask(Needles("essay", keys=4, queries=4), 128),
    "vt": RulerTask(Tracking(), 30),
    "cwe": RulerTask(CommonWords(), 120),
    "fwe": RulerTask(FrequentWords(), 50),
    "qa_1": RulerTask(Reading("squad"), 32, string_match_part),
    "qa_2": RulerTask(Reading("hotpotqa"), 32, string_match_part),
}
THRESHOLD = 85.6  # Llama-2-7B's average at 4K: what the paper calls satisfactory

TEMPLATES = {
    "noise": "Rain falls on the hills. The river runs to the sea. A bird sings in the tree. Night comes, and then"
    " comes day.",
    "needle": "One of the special magic {kind} for {key} is: {value}.",
    "niah_intro": "A few special magic {kind} are hidden in this text. Read it and keep them in mind; you will be"
    " asked for them at its end.\n\n",
    "niah_question": "\n\nWhich special magic {kind} does the text give for {keys}?\n",
    "niah_answer": "The text gives these special magic {kind} for {keys}:",
    "vt_first": "VAR {name} = {value}.",
    "vt_next": "VAR {name} = VAR {before}.",
    "vt_intro": "Variables are assigned in this text, some of them from one another. Follow the assignments.\n\n",
    "vt_question": "\n\nWhich variables have the value {value} by the assignments in the text? Name all of them.\n",
    "vt_answer": "These {count} variables have the value {value}:",
    "cwe_intro": "This is a numbered list of words. Some of its words come much more often than the others.\n\n",
    "cwe_question": "\n\nWhich {count} words come most often in the list?\n",
    "cwe_answer": "The {count} words that come most often are:",
    "fwe_intro": "This is a text of coded words. Leave the dots '....' out of account and find the words that come"
    " most often.\n\n",
    "fwe_question": "\n\nWhich {count} coded words come most often in the text, not counting '....'?\n",
    "fwe_answer": "The {count} coded words that come most often are:",
    "qa_intro": "Answer the question from the documents. Give the answer alone, without any other word.\n\n",
    "qa_document": "Document {number}:\n{text}",
    "qa_question": "\n\nAnswer the question from the documents. Give the answer alone, without any other word.\n"
    "Question: {question}\n",
    "qa_answer": "Answer:",
}


def needs(task: str) -> str | None:
    """The flag without which a task cannot be made: haystack, squad, hotpotqa or None."""
    spec = TASKS[task].spec
    if isinstance(spec, Needles):
        return "haystack" if spec.haystack == "essay" else None
    return spec.dataset if isinstance(spec, Reading) else None


def effective_length(averages: dict[str, dict[str, Any]], threshold: float) -> int | None:
    """The longest length whose average (0 to 1) is at least `threshold` percent; None where none is."""
    good = [int(length) for length, share in averages.items() if 100 * share["mean"] >= threshold]
    return max(good, default=None)


def weighted_average(averages: dict[str, dict[str, Any]], *, increasing: bool) -> float:
    """The paper's wAvg, in percent: weights that rise (or fall) by one from length to length."""
    means = [averages[length]["mean"] for length in sorted(averages, key=int, reverse=not increasing)]
    weights = range(1, len(means) + 1)
    return 100 * sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)
