"""Tiny random models of every family in the test matrix."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A configuration of `family` with 2 layers, 4 query and 2 key/value heads."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,  # large enough that attention is far from uniform
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return AutoConfig.for_model(family, **(settings | FAMILY_EXTRAS[family] | overrides))


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `tiny_config`, the same on every process."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)


def ragged_batch(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels `[B, S]`; labels hold random -100 stretches, and one row's second half has no loss at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    labels = ids.clone()
    if length >= 16:  # in a shorter one nothing would be left that needs attention
        labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
        labels[-1, length // 2 :] = -100
    return ids, labels
