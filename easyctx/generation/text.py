"""From logits to tokens, and from tokens to the text of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """What a model said.

    text: the decoded tokens without special ones, up to the stop string where one ended it.
    token_ids: all tokens that were generated, with the end-of-text token or those of the stop string.
    stopped_by: "eos" (the model ended its text), "stop" (a stop string), "length" (`max_new_tokens`).
    """

    text: str
    token_ids: list[int]
    stopped_by: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from the likeliest ones that make up `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give more than 0, at most 1")

    def draw(self, logits: torch.Tensor, questions: Sequence[int], step: int) -> list[int]:
        """A token for each question, by its logits `[len(questions), V]`.

        A draw depends on seed, question and step alone, not on which other questions there are.
        """
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        return [self._draw(row, (self.seed, question, step)) for row, question in zip(logits, questions, strict=True)]

    def _draw(self, logits: torch.Tensor, key: tuple[int, int, int]) -> int:
        probabilities = (logits.double().cpu() / self.temperature).softmax(-1)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        # A token belongs if those before it do not make up top_p yet; the first always does.
        ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0.0
        generator = torch.Generator().manual_seed(hash(key) % 2**63)
        return int(tokens[torch.multinomial(ordered, 1, generator=generator)])


class Writer:
    """The tokens of one answer as they come, until something ends it."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], stop: Sequence[str], max_new_tokens: int) -> None:
        self.tokenizer, self.ends, self.stop, self.max_new_tokens = tokenizer, ends, stop, max_new_tokens
        self.token_ids: list[int] = []
        self.answer: Answer | None = None

    def add(self, token: int) -> None:
        """Take a token, and end the answer if it is complete."""
        self.token_ids.append(token)
        if token in self.ends:
            self._end(self._decode(), "eos")
            return
        if self.stop:
            text = self._decode()
            found = [at for at in map(text.find, self.stop) if at >= 0]
            if found:
                self._end(text[: min(found)], "stop")
                return
            # A stop string that is a special token is not in the text.
            with_specials = self.tokenizer.decode(self.token_ids, skip_special_tokens=False)
            if any(each in with_specials for each in self.stop):
                self._end(text, "stop")
                return
        if len(self.token_ids) == self.max_new_tokens:
            self._end(self._decode(), "length")

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))

    def _end(self, text: str, stopped_by: str) -> None:
        self.answer = Answer(text, self.token_ids, stopped_by)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The token ids that end a text: those of the model's generation configuration, and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
