"""What stands round every prompt: special tokens by the tokenizer's own policy, or its chat template."""

from __future__ import annotations

from typing import Any

import numpy as np

from easyctx.evals.encoding import PieceEncoder, Span, TextEncoder
from easyctx.evals.haystack import fit_count

MARK = "easyctx-user-text"


class PromptShell:
    """Turns a user's text into the tokens that the model is fed."""

    def __init__(self, encoder: TextEncoder, chat: bool = False):
        self.encoder = encoder
        self.before, self.after = _chat_parts(encoder.tokenizer) if chat else ("", "")
        # A chat template writes its own special tokens.
        self.leading = [] if chat else encoder.leading

    def encode(self, text: str, answer_prefix: str = "") -> np.ndarray:
        """Tokens of the prompt that asks `text` and lets the answer begin with `answer_prefix`: [n] int64."""
        return self._with_leading(self.encoder.encode(self.before + text + self.after + answer_prefix).ids)

    def cut(self, text: str, least: int, tail: str, num_tokens: int) -> tuple[np.ndarray, str]:
        """The prompt `text` + `tail` with `text` cut so that it has exactly `num_tokens`: tokens [n], what is left.

        At least `least` characters of the text stay. `tail` includes what comes after the user's text
        (`after`). The text is tokenised once, then only round the cut. Raises ValueError for no such cut.
        """
        pieces = PieceEncoder(self.encoder, self.before + text)
        first = len(self.before) + least

        def encode(num_chars: int, filler: str) -> np.ndarray:
            kept = [Span(0, first + num_chars)] if first + num_chars else []
            return self._with_leading(pieces.encode_pieces([*kept, filler + tail]).ids)

        shortest = len(encode(0, ""))
        if shortest > num_tokens:
            raise ValueError(f"the prompt takes at least {shortest} tokens, and there is room for {max(num_tokens, 0)}")
        num_chars, filler = fit_count(
            lambda chars, filler: len(encode(chars, filler)),
            target=num_tokens,
            guess=pieces.chars_of(first, num_tokens - shortest),
            move=lambda chars, tokens: chars + pieces.chars_of(first + chars, tokens),
            limit=len(text) - least,
        )
        return encode(num_chars, filler), text[: least + num_chars] + filler

    def _with_leading(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(self.leading, dtype=np.int64), ids])


def _chat_parts(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and after a single user message, up to the assistant's turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: this model's tokenizer has no chat template; leave --chat out")
    message = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    before, mark, after = text.partition(MARK)
    if not mark:
        raise ValueError("--chat: this model's chat template changes the user's text")
    return before, after
