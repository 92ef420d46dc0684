"""Load any tokenizer, decide on BOS and EOS, and turn texts into ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from easyctx.data.pieces import can_cut
from easyctx.data.segments import SegmentEncoder

# Letters, digits, contractions, accents, CJK, an emoji and odd spaces: where a tokenizer class that adds
# steps of its own to the backend would show it.
PROBE = "  Don't stop: 1234567 naïve cafés,\t日本語 🙂\r\n\n  x=_y "


@dataclass(frozen=True)
class BoundaryTokens:
    """Ids put before and after each document (None: nothing), and why, in words for the user."""

    bos_id: int | None
    eos_id: int | None
    bos_reason: str
    eos_reason: str


class Encoder(Protocol):
    """Texts to ids, without BOS and EOS; picklable, so that worker processes can be given one."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array [T] for each text."""


@dataclass(frozen=True)
class BackendEncoder:
    """A fast tokenizer's Rust backend, without the offsets and masks that its wrapper would make."""

    backend: Any

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array [T] for each text."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


@dataclass(frozen=True)
class WrapperEncoder:
    """Any tokenizer through its public call: slow ones, and fast ones that do more than their backend."""

    tokenizer: Any

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array [T] for each text."""
        batch = self.tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False)
        return [np.array(ids, dtype=np.int32) for ids in batch["input_ids"]]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name; `ValueError` with the reason if it does not load."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ValueError(f"tokenizer {name}: no such folder (looked for {path.absolute()})")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:  # a broken tokenizer file raises whatever its parser raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"tokenizer {name} does not load: {reason}. Pass a folder that save_pretrained made, or a hub name"
        ) from error
    # Documents longer than the model's old context are the point here: no warning about them.
    tokenizer.model_max_length = 1 << 60
    return tokenizer


def make_encoder(tokenizer: Any) -> Encoder:
    """The fastest encoder that gives the tokenizer's own ids."""
    wrapper = WrapperEncoder(tokenizer)
    if not tokenizer.is_fast:
        return wrapper
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encoder = BackendEncoder(backend)
    probes = [PROBE, PROBE.strip(), *tokenizer.all_special_tokens]
    same = all(map(np.array_equal, wrapper.encode(probes), encoder.encode(probes)))
    if not same:
        return wrapper
    return SegmentEncoder(backend) if can_cut(backend.to_str()) else encoder


def vocabulary_size(tokenizer: Any) -> int:
    """Smallest embedding that holds every id: the largest id + 1 (`len(tokenizer)` if ids have no gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def choose_boundary_tokens(tokenizer: Any, *, bos: bool | None = None, eos: bool | None = None) -> BoundaryTokens:
    """Decide what goes before and after each document.

    `None` decides by the tokenizer: BOS if it puts one before plain text itself (so that training sees what
    inference will), EOS if it has one, and only one of the two if both are the same token. `True` for a
    token that the tokenizer does not have raises `ValueError`.
    """
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    for name, wanted, token_id in (("bos", bos, bos_id), ("eos", eos, eos_id)):
        if wanted and token_id is None:
            raise ValueError(f"--{name} asked for, but the tokenizer has no {name.upper()} token: leave it out")
    adds_bos = bos_id is not None and _adds_bos(tokenizer, bos_id)
    if bos is None:
        use_bos = adds_bos
        if bos_id is None:
            bos_reason = "the tokenizer has none"
        else:
            bos_reason = "the tokenizer adds it" if adds_bos else "the tokenizer has one but does not add it"
    else:
        use_bos, bos_reason = bos, "asked for" if bos else "left out as asked"
    if eos is None:
        use_eos = eos_id is not None and not (use_bos and bos_id == eos_id)
        eos_reason = "the tokenizer has one" if use_eos else "the tokenizer has none"
        if eos_id is not None and not use_eos:
            eos_reason = "the same token as BOS"
    else:
        use_eos, eos_reason = eos, "asked for" if eos else "left out as asked"
    return BoundaryTokens(bos_id if use_bos else None, eos_id if use_eos else None, bos_reason, eos_reason)


def _adds_bos(tokenizer: Any, bos_id: int) -> bool:
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    return len(dressed) > len(plain) and dressed[0] == bos_id
