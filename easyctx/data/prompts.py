"""Prompts of a file, as token ids: what a model is asked while it is trained.

A line of text is a prompt as it is. A JSON line has the fields of an example (`easyctx.data.examples`), of which the
response is not needed: `prompt`; `document` and `question`; or `messages`, up to the last one of a user.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from easyctx.data.cut import Limit, Span, Tokens, cut_document
from easyctx.data.examples import chat_prompt, check_fast, prompt_of
from easyctx.data.sources import BadRecords, check_text, read_records
from easyctx.data.tokenizer import choose_boundary_tokens


def read_prompts(path: str, tokenizer: Any, limit: str, most: int) -> list[list[int]]:
    """The token ids of each prompt, as training has them in front of a response.

    Longer ones lose the end of their document.

    Args:
        path: a text file, or JSON lines (.jsonl).
        limit, most: the name of the largest number of tokens, and that number.

    Raises:
        ValueError: no such file, no prompt in it, one that cannot be used, a tokenizer that cannot cut.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{path} is no file (looked for {file.absolute()}): name one of text or JSON lines")
    check_fast(tokenizer)
    prompts = []
    for where, content in _contents(file):
        try:
            prompts.append(_token_ids(content, tokenizer, limit, most))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def _contents(file: Path) -> list[tuple[str, str | dict[str, Any]]]:
    if file.name.endswith(".jsonl"):
        records = read_records([file], bad=BadRecords(False), on_bytes=lambda _: None)
        return [(record.where, record.content) for record in records]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    return [(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _token_ids(content: str | dict[str, Any], tokenizer: Any, limit: str, most: int) -> list[int]:
    text, document, is_chat = _text(content, tokenizer)
    check_text(text)
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True)
    ids, offsets = np.array(encoded["input_ids"], dtype=np.int32), np.array(encoded["offset_mapping"]).reshape(-1, 2)
    bos = None if is_chat else choose_boundary_tokens(tokenizer).bos_id
    if bos is not None:
        ids, offsets = np.insert(ids, 0, bos), np.insert(offsets, 0, -1, axis=0)
    tokens = Tokens(ids, offsets[:, 0], offsets[:, 1], np.zeros(len(ids), bool), np.ones(len(ids), bool))
    if len(ids) == 0:
        raise ValueError("the prompt gives no tokens")
    what = "prompt and marks" if document is None else "question and marks"
    cut_document(tokens, document, [Limit(limit, most, len(ids), what)])
    kept: list[int] = ids[tokens.stays].tolist()
    return kept


def _text(content: str | dict[str, Any], tokenizer: Any) -> tuple[str, Span | None, bool]:
    """The prompt, the span of its document, and whether it is a chat."""
    if isinstance(content, str):
        return content, None, False
    if content.get("messages") is not None:
        return chat_prompt(tokenizer, content["messages"]), None, True
    text, document = prompt_of(content)
    return text, document, False
