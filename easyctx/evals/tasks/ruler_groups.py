"""RULER's questions: each task, length and sample as one prompt of exactly that length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from easyctx.evals.haystack import Haystack
from easyctx.evals.tasks.predictions import field_of, read_records, text_of, texts_of
from easyctx.evals.tasks.questions import Group, Question
from easyctx.evals.tasks.ruler_draft import Draft, fit_draft
from easyctx.evals.tasks.ruler_lists import common_words_draft, fewest_frequent_words, frequent_words_draft
from easyctx.evals.tasks.ruler_needles import draw_needles, essay_prompt, needle_draft, tracking_draft
from easyctx.evals.tasks.ruler_qa import Collection, reading_draft
from easyctx.evals.tasks.ruler_tasks import (
    TASKS,
    CommonWords,
    FrequentWords,
    Needles,
    Tracking,
)
from easyctx.evals.tasks.shell import PromptShell


@dataclass
class Sources:
    """What prompts are made of: wording, an essay's text, the collections of paragraphs; and the seed."""

    templates: dict[str, str]
    seed: int
    essay: str | None = None
    collections: dict[str, Collection] = field(default_factory=dict)
    longest: int = 0  # tokens, of all prompts
    _haystacks: dict[int, Haystack] = field(default_factory=dict)

    def haystack(self, shell: PromptShell) -> Haystack:
        """The essay as this shell's tokenizer sees it; tokenised once."""
        assert self.essay is not None
        if id(shell) not in self._haystacks:
            self._haystacks[id(shell)] = Haystack(shell.encoder, self.essay, self.longest)
        return self._haystacks[id(shell)]


def group_of(task: str, length: int, sample: int, sources: Sources, max_new_tokens: int) -> Group:
    """One prompt; it and its answer have `length` tokens."""
    item = f"{task}/{length}/{sample}"
    labels = {"length": length, "sample": sample}

    def build(shell: PromptShell) -> list[Question]:
        try:
            ids, references = _prompt(task, length - max_new_tokens, sample, sources, shell)
        except ValueError as error:
            raise ValueError(
                f"--lengths has {length}, {max_new_tokens} of them for the answer: too short for {task}: {error}. "
                f"Raise --lengths, or leave {task} out of --tasks"
            ) from error
        return [Question(item, ids, references, labels)]

    return Group(task, length, (item,), build, TASKS[task].score, max_new_tokens)


def _prompt(
    task: str, num_tokens: int, sample: int, sources: Sources, shell: PromptShell
) -> tuple[np.ndarray, list[str]]:
    # Neither the length nor the tokenizer is in the seed: the same needles at every length.
    seed = f"{task} {sources.seed} {sample}"
    spec, templates = TASKS[task].spec, sources.templates
    if isinstance(spec, Needles) and spec.haystack == "essay":
        hidden = draw_needles(spec, seed, templates)
        return essay_prompt(shell, sources.haystack(shell), hidden, num_tokens), hidden.references
    draft_of, least = _drafts(task, num_tokens, seed, sample, sources)
    ids, draft = fit_draft(shell, draft_of, least, num_tokens)
    return ids, draft.references


def _drafts(task: str, num_tokens: int, seed: str, sample: int, sources: Sources) -> tuple[Callable[[int], Draft], int]:
    """The prompt of a task by its number of units, and the fewest units."""
    spec, templates = TASKS[task].spec, sources.templates
    if isinstance(spec, Needles):
        return lambda units: needle_draft(spec, units, seed, templates), 1
    if isinstance(spec, Tracking):
        return lambda units: tracking_draft(spec, units, seed, templates), 1
    if isinstance(spec, CommonWords):
        return lambda units: common_words_draft(spec, units, seed, templates), spec.common
    if isinstance(spec, FrequentWords):
        words = max(num_tokens // spec.tokens_a_word, 2 * spec.asked)
        least = fewest_frequent_words(spec, words)
        return lambda units: frequent_words_draft(spec, units, words, seed, templates), least
    collection = sources.collections[spec.dataset]
    order = list(range(len(collection.readers)))
    random.Random(f"questions {sources.seed}").shuffle(order)
    reader = collection.readers[order[sample % len(order)]]
    return lambda units: reading_draft(collection, reader, units, seed, templates), len(reader.paragraphs)


def prepared_groups(folder: Path, tasks: list[str]) -> list[Group]:
    """Prompts that NVIDIA's scripts prepared: LENGTH/…/TASK/*.jsonl below `folder`, rows of `input`, `outputs`."""
    groups: list[Group] = []
    for file in sorted(folder.rglob("*.jsonl")):
        if file.parent.name in tasks:
            groups += _prepared(file, file.parent.name)
    if not groups:
        raise ValueError(f"--data {folder} holds no TASK/*.jsonl of the tasks {', '.join(tasks)}")
    return groups


def _prepared(file: Path, task: str) -> list[Group]:
    rows = list(read_records(file))
    length = length_of(file) or max(int(field_of(row, ("length",), place)) for place, row in rows)
    return [_prepared_group(task, length, number, place, row) for number, (place, row) in enumerate(rows)]


def _prepared_group(task: str, length: int, number: int, place: str, row: dict[str, object]) -> Group:
    text, prefix = text_of(row, ("input",), place), str(row.get("answer_prefix") or "")
    references = texts_of(field_of(row, ("outputs",), place), place)
    item = f"{task}/{length}/{row.get('index', number)}"

    def build(shell: PromptShell) -> list[Question]:
        return [Question(item, shell.encode(text, prefix), references, {"length": length, "sample": number})]

    return Group(task, length, (item,), build, TASKS[task].score, TASKS[task].max_new_tokens)


def length_of(file: Path) -> int | None:
    """The name of one of the three folders above a file, where it is a number: LENGTH/data/TASK, LENGTH/pred."""
    return next((int(parent.name) for parent in file.resolve().parents[:3] if parent.name.isdigit()), None)
