"""A model's configuration made small: fewer layers and narrow, with everything that attention depends on kept.

Kept: head counts, head dim, the kinds of layers, biases, sinks, softcap, RoPE's kind and base. Arithmetic on the
configuration alone; no tensor is made.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from easyctx.capability import window_of

HIDDEN, MLP, VOCABULARY = 128, 160, 131
LONGEST_REAL_WINDOW = 512  # sequences that outgrow longer ones are left to those who ask for them

_MLP_KEYS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOKEN_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass
class Small:
    """A small configuration, which layers of the original it kept, its sequence length, and what was done."""

    config: Any
    layers: list[int]
    seq_length: int
    notes: list[str] = field(default_factory=list)


def shrink(
    config: Any,
    *,
    num_layers: int,
    seq_length: int | None,
    sp: int,
    packed: bool = False,
    all_experts: bool = False,
    keep_hidden: bool = False,
) -> Small:
    """A copy of a text configuration, small enough for a laptop.

    Args:
        num_layers: layers to keep; more are kept where the model has more kinds of layers.
        seq_length: tokens to a sequence, or None for a prime that outgrows windows up to 512.
        sp: ranks that share a sequence.
        packed: rows will be cut into documents, of which one is half a row or longer.
        all_experts: as many experts as a token goes to, so that rounding cannot change which ones.
        keep_hidden: keep the residual width, for families whose head dim follows from it.
    """
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    small.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = kept_layers(config, num_layers)
    _keep(small, layers)
    notes = []
    if len(layers) > num_layers:
        notes.append(f"{len(layers)} layers instead of {num_layers}: one of each kind that the model has")
    notes += _narrow(small, keep_hidden, all_experts)
    window = window_of(small)
    length = seq_length or default_length(sp, window, packed)
    notes += _fit_window(small, window, length)
    notes += _fit_rope(small, length, packed)
    small.use_cache = False
    return Small(small, layers, length, notes)


def kinds_of_layers(config: Any) -> list[tuple[Any, ...]]:
    """What tells a layer from others, for each layer: its entries in the configuration's per-layer lists."""
    number = config.num_hidden_layers
    lists = [v for v in _lists(config).values() if len(v) == number]
    indices = [v for k, v in _lists(config).items() if k in ("mlp_only_layers", "moe_layers")]
    sparse_step = getattr(config, "decoder_sparse_step", None) or 1
    return [
        (*(values[i] for values in lists), *(i in some for some in indices), (i + 1) % sparse_step == 0)
        for i in range(number)
    ]


def kept_layers(config: Any, num_layers: int) -> list[int]:
    """Indices of the layers to keep: the first of each kind, and then the first ones, up to `num_layers`."""
    kinds = kinds_of_layers(config)
    first = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
    rest = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + rest[: max(num_layers - len(first), 0)])


def default_length(sp: int, window: int | None, packed: bool) -> int:
    """A prime, so that it divides by nothing: 24 tokens a rank or more, and half as long again as the window."""
    length = max(96, 24 * sp)
    if window is not None and window <= LONGEST_REAL_WINDOW:
        length = max(length, window * 3 // (1 if packed else 2))
    length += 1
    while any(length % divisor == 0 for divisor in range(2, int(length**0.5) + 1)):
        length += 1
    return length


def _lists(config: Any) -> dict[str, list[Any]]:
    others = ("architectures", *_TOKEN_KEYS)
    return {k: v for k, v in vars(config).items() if isinstance(v, list) and not k.startswith("_") and k not in others}


def _keep(small: Any, layers: list[int]) -> None:
    number = small.num_hidden_layers
    for name, values in _lists(small).items():
        if name in ("mlp_only_layers", "moe_layers"):
            setattr(small, name, [new for new, old in enumerate(layers) if old in values])
        elif len(values) == number:
            setattr(small, name, [values[i] for i in layers])
    small.num_hidden_layers = len(layers)


def _narrow(small: Any, keep_hidden: bool, all_experts: bool) -> list[str]:
    """Make everything narrow that is not attention; says what became of what."""
    widths = dict.fromkeys(_MLP_KEYS, MLP) | {"vocab_size": VOCABULARY}
    if not keep_hidden:
        widths["hidden_size"] = HIDDEN
    top_k = getattr(small, "num_experts_per_tok", None)
    if top_k:
        widths |= {name: top_k if all_experts else max(2 * top_k, 4) for name in _EXPERT_KEYS}
    changes: dict[str, str] = {}
    for name, narrow in widths.items():
        before = getattr(small, name, None)
        if isinstance(before, int) and before > narrow:
            setattr(small, name, narrow)
            changes[name] = f"{before:,} -> {narrow:,}"
    for name in _TOKEN_KEYS:
        if hasattr(small, name):
            setattr(small, name, None)
    return [", ".join(f"{name} {change}" for name, change in changes.items())] if changes else []


def _fit_window(small: Any, window: int | None, length: int) -> list[str]:
    if window is None:
        return []
    if window < length:
        return [f"sliding window {window:,} kept as it is: sequences of {length:,} tokens outgrow it"]
    small.sliding_window = max(2, length // 3 | 1)
    return [
        f"sliding window {window:,} -> {small.sliding_window}, so that it matters in {length:,} tokens "
        f"(--seq-length above {window:,} keeps it)"
    ]


def _fit_rope(small: Any, length: int, packed: bool) -> list[str]:
    """RoPE kinds that change beyond a length: move that length into the sequences, near their end.

    So near that some rank of a zigzag or contiguous layout holds no position beyond it.
    """
    rope = getattr(small, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("dynamic", "longrope"):
        return []
    original = rope.get("original_max_position_embeddings") if kind == "longrope" else None
    original = original or getattr(small, "original_max_position_embeddings", None) or small.max_position_embeddings
    if length > original:
        return []
    if packed:  # the oracle runs documents alone, and their own lengths would count
        return [f"{kind} RoPE stays below its {original:,} tokens: --packed compares documents of many lengths"]
    turn = length * 9 // 10
    ratio = small.max_position_embeddings / original
    small.max_position_embeddings = round(turn * ratio)
    if kind == "longrope":
        rope["original_max_position_embeddings"] = turn
        if hasattr(small, "original_max_position_embeddings"):
            small.original_max_position_embeddings = turn
    return [f"{kind} RoPE changes above {turn} tokens instead of {original:,}, so that it does in {length}"]
