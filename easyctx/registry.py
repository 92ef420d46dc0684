"""What transformers calls in a patched model: our rows in its registries of attention and of mask functions.

A patched decoder passes `Batch` down to its attention layers as a keyword. A model that was not patched, but shares its
configuration with one that was, comes here too, without that keyword, and gets what it would have had.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from easyctx.attention import seq_parallel_attention
from easyctx.capability import check_call, needs_eager
from easyctx.kernel import Score

IMPLEMENTATION = "easyctx"
KEYWORD = "easyctx_context"

_state = threading.local()


class Batch(NamedTuple):
    """What a patched decoder passes down to its attention layers: numbers under which the operator finds the rest."""

    context: int
    documents: int


class Attends(Protocol):
    """What may stand in `Batch`'s place: something that computes a layer's attention itself (`easyctx.generation`)."""

    def attend(
        self,
        layer: int,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        score: Score,
        window: int | None,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """The attention's output, like `q_BSHD`, of the tokens that the layer was called with."""


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that transformers calls: q `[B, H, S, D]`, k and v `[B, K, S, D]` -> `[B, S, H, D]`."""
    batch: Batch | Attends | None = kwargs.pop(KEYWORD, None)
    if batch is None:
        stock = _stock_attention(module)
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    check_call(module, dropout, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        autocast = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"attention got mixed dtypes: q {query.dtype}, k {key.dtype}, v {value.dtype}")
    q_BSHD, k_BSKD, v_BSKD = (t.transpose(1, 2) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks, softcap, window = (kwargs.get(name) for name in ("s_aux", "softcap", "sliding_window"))
    if not isinstance(batch, Batch):
        score = Score(scale, softcap or None)
        layer: Any = module.layer_idx
        return batch.attend(layer, q_BSHD, k_BSKD, v_BSKD, score, window or None, sinks), None
    numbers = (scale, softcap or 0.0, window or 0, batch.documents, batch.context)
    out, _ = seq_parallel_attention(q_BSHD, k_BSKD, v_BSKD, sinks, *numbers)
    return out, None


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask function that transformers calls: in a patched decoder there is nothing to build."""
    if getattr(_state, "depth", 0):
        return None
    return eager_mask(**kwargs) if needs_eager(kwargs["config"]) else sdpa_mask(**kwargs)


def _stock_attention(module: Any) -> Callable[..., Any]:
    """The attention of a model that was not patched, but shares its configuration with one that was."""
    if needs_eager(module.config):
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def inside_patch() -> Iterator[None]:
    """Tells the mask function that the decoder which is running is a patched one."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
