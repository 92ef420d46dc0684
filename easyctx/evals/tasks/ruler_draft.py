"""A prompt that grows by units (sentences, words, documents), and growing it to an exact length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from easyctx.evals.tasks.shell import PromptShell

TURNS = 16
LONG = 1 << 15  # tokens; how many units fit is then estimated, so that the whole is tokenised only once
STRETCHES, STRETCH = 48, 4096  # of the text that is tokenised for that, and their characters


@dataclass(frozen=True)
class Draft:
    """`context` + (as much of `filler` as is left of the length) + `question`, and how the answer begins.

    The filler is `spare_units` further units of the context that change nothing of the answer.
    """

    context: str
    question: str
    answer_prefix: str
    references: list[str]
    filler: str


def spare_units(num_units: int) -> int:
    """Units that the filler of a draft holds; a long prompt is then found in two or three turns."""
    return 2 + num_units // 32


def fit_draft(
    shell: PromptShell, draft_of: Callable[[int], Draft], least: int, num_tokens: int
) -> tuple[np.ndarray, Draft]:
    """Tokens [num_tokens] of a draft with as many units as fit, the last of them cut, and the draft.

    `draft_of(n)` must be the same at each call. Raises ValueError where `least` units are too long.
    """
    if num_tokens >= LONG:
        units = _estimated_units(shell, draft_of, least, num_tokens)
        try:
            return _cut(shell, draft_of(units), num_tokens)
        except ValueError:  # estimated wrongly; counted, it takes longer
            pass
    return _cut(shell, draft_of(_counted_units(shell, draft_of, least, num_tokens)), num_tokens)


def _cut(shell: PromptShell, draft: Draft, num_tokens: int) -> tuple[np.ndarray, Draft]:
    tail = draft.question + shell.after + draft.answer_prefix
    ids, _ = shell.cut(draft.context + draft.filler, len(draft.context), tail, num_tokens)
    return ids, draft


def _estimated_units(shell: PromptShell, draft_of: Callable[[int], Draft], least: int, num_tokens: int) -> int:
    """Units so that the end lies amid the filler, by the tokens of stretches from all over the text."""

    def estimate(text: str) -> float:
        begins = range(0, len(text), max(len(text) // STRETCHES, STRETCH))
        stretches = [text[begin : begin + STRETCH] for begin in begins]
        tokens = sum(len(shell.encoder.encode(stretch)) for stretch in stretches)
        return tokens * len(text) / sum(map(len, stretches))

    units = max(least, num_tokens // 16)
    for _ in range(4):
        draft = draft_of(units)
        tokens, filler = estimate(draft.context), estimate(draft.filler)
        missing = num_tokens - tokens - filler / 2
        if abs(missing) < filler / 8:
            break
        units = max(least, units + int(missing * units / tokens))
    return units


def _counted_units(shell: PromptShell, draft_of: Callable[[int], Draft], least: int, num_tokens: int) -> int:
    """The most units that fit, but for those that the filler makes up for."""

    def count(num_units: int) -> int:
        draft = draft_of(num_units)
        return len(shell.encode(draft.context + draft.question, draft.answer_prefix))

    units, tokens = least, count(least)
    if tokens > num_tokens:
        raise ValueError(f"the prompt takes at least {tokens} tokens, and there is room for {max(num_tokens, 0)}")
    per_unit = max((count(2 * least + 8) - tokens) / (least + 8), 0.1)
    # From a tenth of the length on a unit's tokens are known well.
    for aim in [num_tokens // 10] + [num_tokens] * TURNS:
        spare = per_unit * spare_units(units)
        if aim == num_tokens and num_tokens - tokens <= 0.75 * spare:
            break
        reached = units + int((aim - tokens - 0.25 * spare) / per_unit)
        if reached <= units:
            continue
        reached_tokens = count(reached)
        per_unit = max((reached_tokens - tokens) / (reached - units), 0.1)
        if reached_tokens <= num_tokens:
            units, tokens = reached, reached_tokens
    return units
