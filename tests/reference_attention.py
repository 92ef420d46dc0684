"""The one-process oracle of whole models: attention written out densely, in the dtype of the model.

Register-and-switch, like any attention of transformers: `use_reference(model)`. It takes what the families pass to
their attention function (sliding window, softcap, sinks), and document borders through the model's forward:
`model(ids, reference_documents=documents)`.

Stock attention is no oracle for all of that: "sdpa" knows neither softcap nor sinks and is refused by Gemma 2 and
gpt-oss; "eager" takes its softmax in float32; and neither takes document borders with positions that do not restart.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

IMPLEMENTATION = "easyctx_test_reference"


def use_reference(model: PreTrainedModel) -> PreTrainedModel:
    """Switch `model` to the oracle's attention, for good; returns it."""
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def reference_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    reference_documents: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with everything that families add to it, as transformers calls it.

    Args:
        query: `[B, H, S, D]`; key, value: `[B, K, S, D]` with K dividing H; any floating dtype, which is computed in.
        attention_mask: bool or int `[B, S]`, 0 for keys that only they themselves may look at (padding); or None.
        sliding_window: keys that a query sees, itself among them.
        softcap: scores become `softcap * tanh(scores / softcap)`, after scaling and before masking.
        s_aux: sinks `[H]`: one more score in each row, which has no value.
        reference_documents: int64 `[B, S]`, the document of each token; tokens of different ones do not see each other.

    Returns:
        The output `[B, S, H, D]` and the probabilities `[B, H, S, S]`.

    Raises:
        ValueError: dropout, attention that is not causal, queries and keys of unequal number (a cache).
    """
    if dropout or not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"the reference takes whole causal sequences without dropout: {query.shape[2]} queries, "
            f"{key.shape[2]} keys, dropout {dropout}, is_causal {getattr(module, 'is_causal', True)}"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = visible(query.shape[2], sliding_window, reference_documents, attention_mask, query.device)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]]
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def visible(
    length: int,
    sliding_window: int | None,
    documents: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Which key each query sees: bool `[1 or B, 1, S, S]`. Arguments as in `reference_attention`."""
    token = torch.arange(length, device=device)
    behind = token[:, None] - token
    allowed = (behind >= 0)[None]
    if sliding_window is not None:
        allowed = allowed & (behind < sliding_window)
    if documents is not None:
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    if attention_mask is not None:
        # Padding sees itself, so that no row is empty: the softmax of an empty row is NaN, and NaN x 0 is NaN.
        allowed = allowed & (attention_mask.bool()[:, None, :] | (behind == 0))
    return allowed[:, None]


def _mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """What transformers hands to the attention function: the padding mask `[B, S]` as it came, if it hides any."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register(IMPLEMENTATION, reference_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
