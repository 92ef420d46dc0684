"""The quickstart's text: CPython's own help topics, which every Python carries, without repeated paragraphs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

HELD_OUT_SHARE = 8  # one topic of so many is held out
PARAGRAPH_BORDER = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Text:
    """ASCII text and its bytes."""

    string: str

    @cached_property
    def ids(self) -> np.ndarray:
        """The bytes of the text, which are also its token ids: [num_bytes] int64."""
        return to_ids(self.string)


def to_ids(text: str) -> np.ndarray:
    """[num_bytes] int64, one id a byte. Raises ValueError for text that is not ASCII."""
    try:
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64)
    except UnicodeEncodeError as error:
        raise ValueError(f"the quickstart's text must be ASCII, but holds {error.object[error.start]!r}") from None


def load_topics() -> dict[str, str]:
    """Name to text of the topics that `help()` shows in this Python."""
    from pydoc_data.topics import topics

    return dict(topics)


def split_topics(topics: Mapping[str, str]) -> tuple[Text, Text]:
    """(training text, held-out text) with no paragraph in common and none twice.

    A topic is held out by a hash of its name, so the split is the same on every machine and for every seed.
    Many paragraphs stand in several topics: held-out ones are taken out of the training text.
    """
    held_out = [name for name in sorted(topics) if _is_held_out(name)]
    training = [name for name in sorted(topics) if not _is_held_out(name)]
    seen: set[str] = set()
    held_out_text = _join([topics[name] for name in held_out], seen)
    return Text(_join([topics[name] for name in training], seen)), Text(held_out_text)


def unigram_perplexity(training: Text, held_out: Text) -> float:
    """Perplexity a byte of the held-out text under the byte frequencies of the training text (one added each)."""
    counts = np.bincount(training.ids, minlength=256) + 1
    return float(np.exp(-np.log(counts / counts.sum())[held_out.ids].mean()))


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _join(texts: list[str], seen: set[str]) -> str:
    """All paragraphs that are not in `seen`, which they join (compared without regard to white space)."""
    kept = []
    for text in texts:
        for paragraph in PARAGRAPH_BORDER.split(text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept).encode("ascii", "replace").decode() + "\n"
