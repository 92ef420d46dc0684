"""What an eval of generated answers is made of: questions, and groups of them that share a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from easyctx.evals.tasks.shell import PromptShell


@dataclass(frozen=True)
class Question:
    """One prompt and what its answer is compared with.

    `item` names it among all questions of the eval; `labels` are further columns of its row.
    """

    item: str
    ids: np.ndarray  # [n] int64, the whole prompt
    references: list[str]
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Questions on one context, built only when their turn comes.

    `items` are the names that `build` will give; `size` is roughly the tokens of a prompt. Groups of one
    `kind` are built alike; `score` compares an answer with its references, from 0 to 1.
    """

    kind: str
    size: int
    items: tuple[str, ...]
    build: Callable[[PromptShell], list[Question]]
    score: Callable[[str, list[str]], float]
    max_new_tokens: int


class GeneratedAnswer(Protocol):
    """What is read of `easyctx.generation.Answer`."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def stopped_by(self) -> str: ...


class Answerer(Protocol):
    """What is asked of `easyctx.generation.Generator`."""

    def answer(
        self,
        context_ids: Sequence[int],
        questions: Sequence[Sequence[int]] = ((),),
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Sequence[GeneratedAnswer]: ...


def split_shared(prompts: list[np.ndarray]) -> tuple[list[int], list[list[int]]]:
    """The tokens that all prompts begin with, and the rest of each.

    Cut by tokens, so that each prompt stays exactly what its whole text is tokenised to. One prompt is all
    context; of several, each keeps at least its last token.
    """
    if len(prompts) == 1:
        return prompts[0].tolist(), [[]]
    shortest = min(len(ids) for ids in prompts) - 1
    same = np.all([ids[:shortest] == prompts[0][:shortest] for ids in prompts], axis=0)
    shared = shortest if same.all() else int(np.argmin(same))
    return prompts[0][:shared].tolist(), [ids[shared:].tolist() for ids in prompts]
