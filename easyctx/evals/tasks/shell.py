"""What stands round every prompt: special tokens by the tokenizer's own policy, or its chat template."""

from __future__ import annotations

from typing import Any

import numpy as np

from easyctx.evals.encoding import PieceEncoder, Span, TextEncoder
from easyctx.evals.haystack import fit_count

MARK = "easyctx-user-text"
CHARS_PER_TOKEN = 3.5  # only a first guess


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

    def fit(self, text: str, tail: str, filler_text: str, num_tokens: int) -> tuple[np.ndarray, str]:
        """`text` + as much of `filler_text` as makes exactly `num_tokens` + `tail`: tokens [n], the filler.

        `tail` includes what comes after the user's text. Only the text round the filler is tokenised more than
        once. Raises ValueError where `text` and `tail` alone are longer.
        """
        pieces = PieceEncoder(self.encoder, self.before + text)
        whole = Span(0, len(pieces.haystack))

        def encode(filler: str) -> np.ndarray:
            return self._with_leading(pieces.encode_pieces([whole, filler + tail]).ids)

        shortest = len(encode(""))
        if shortest > num_tokens:
            raise ValueError(f"the prompt takes {shortest} tokens, {num_tokens} were asked for")
        num_chars, more = fit_count(
            lambda chars, more: len(encode(filler_text[:chars] + more)),
            target=num_tokens,
            guess=0,
            move=lambda chars, tokens: chars + round(tokens * CHARS_PER_TOKEN),
            limit=len(filler_text),
        )
        filler = filler_text[:num_chars] + more
        return encode(filler), filler

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
