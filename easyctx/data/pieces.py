"""Cut a long document into pieces that tokenise, joined, exactly as the whole does.

That holds for a tokenizer that first splits text by one of the regular expressions below. They match a
run of letters up to the next space whatever follows, and start the next match at that space whatever came
before; so between a letter and " letter" no match, and no token, reaches across. Any other tokenizer
(SentencePiece-like ones merge over spaces) gets whole documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

PIECE_CHARACTERS = 1 << 15
CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
HOLDS_A_CUT = re.compile(r"\s|[A-Za-z][,.;:!?]")  # here or in `easyctx.data.segments`

# The pre-tokenizers of Llama 3, Qwen 2 to 3 and gpt-oss; GPT-2's is built into `tokenizers`.
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SAFE_PATTERNS = frozenset(
    {
        f"{_SHORT}|{_LETTERS}|\\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",
        f"{_SHORT}|{_LETTERS}|\\p{{N}}|{_SIGNS}|{_SPACES}",
        f"[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}?|[^\\r\\n\\p{{L}}\\p{{N}}]?{_UPPER}+{_LOWER}*"
        f"{_SHORT}?|\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_SPACES}",
    }
)


def can_cut(tokenizer_json: str) -> bool:
    """Whether a fast tokenizer, given as its JSON, is one of those for which cutting is exact."""
    settings: dict[str, Any] = json.loads(tokenizer_json)
    if settings["model"].get("dropout"):
        return False  # merges at random: each word would be frozen as it first came out
    normalizer = settings["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    for token in settings["added_tokens"]:
        stretches = token["lstrip"] or token["rstrip"] or token["single_word"]
        if stretches or HOLDS_A_CUT.search(token["content"]):
            return False
    return settings["pre_tokenizer"] is not None and _splits_safely(settings["pre_tokenizer"])


def _splits_safely(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "ByteLevel":
        return pre_tokenizer["use_regex"] and not pre_tokenizer["add_prefix_space"]
    if pre_tokenizer["type"] != "Sequence" or len(pre_tokenizer["pretokenizers"]) != 2:
        return False
    split, bytes_ = pre_tokenizer["pretokenizers"]
    return (
        split["type"] == "Split"
        and split["pattern"].get("Regex") in SAFE_PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and bytes_["type"] == "ByteLevel"
        and not bytes_["add_prefix_space"]
        and not bytes_["use_regex"]
    )


def cut(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of `text`, in order, each ending at the first safe place past `size` characters."""
    start = 0
    while match := CUT.search(text, start + size):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]
