"""What a model's attention asks for, layer by layer, as its own code hands it to an attention function."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

PROBE = "easyctx_check_probe"


@dataclass(frozen=True)
class Layer:
    """One layer's attention."""

    index: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: bool
    rope: bool

    @property
    def mask(self) -> str:
        """In a few words: "full causal", "sliding window 33, with sinks", …"""
        parts = ["full causal" if self.window is None else f"sliding window {self.window:,}"]
        if self.sinks:
            parts.append("with sinks")
        if self.softcap:
            parts.append(f"logit softcap {self.softcap:g}")
        if not self.rope:
            parts.append("no RoPE")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mask": self.mask}


_found: list[Layer] = []


def _record(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function that notes what it is asked for, and gives the queries back as they are."""
    _found.append(
        Layer(
            index=len(_found),
            q_heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            scale=scaling,
            window=kwargs.get("sliding_window") or None,
            softcap=kwargs.get("softcap") or None,
            sinks=kwargs.get("s_aux") is not None,
            rope=bool(getattr(module, "use_rope", True)),
        )
    )
    return query.transpose(1, 2).contiguous(), None


def probe(model: PreTrainedModel) -> list[Layer]:
    """The attention of each layer of `model`, in order, found by running it on four tokens.

    Raises:
        ValueError: the model's attention does not go through transformers' attention interface.
    """
    _found.clear()
    with _attention(model, PROBE), torch.no_grad():
        model(input_ids=torch.arange(4, device=model.device)[None])
    layers = list(_found)
    if len(layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"{type(model).__name__} has {model.config.num_hidden_layers} layers, but {len(layers)} of them ask "
            "transformers' attention interface for attention: nothing else can be sharded"
        )
    return layers


def stock_attention(model: PreTrainedModel, layers: list[Layer]) -> str:
    """The implementation of its own attention that one process runs: "sdpa", or "eager" where that is not exact."""
    plain = all(layer.softcap is None and not layer.sinks for layer in layers)
    return "sdpa" if plain and model._supports_sdpa else "eager"


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    AttentionInterface.register(PROBE, _record)
    AttentionMaskInterface.register(PROBE, lambda **_: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
