"""Tiny random models of every family in the test matrix."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
WINDOW = 16  # shorter than the sequences of the tests, longer than a shard of the shortest ones

_ALTERNATING = ["sliding_attention", "full_attention"]
_WINDOW_FROM_LAYER_1 = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}

# Every layer type of a family occurs. Where a family's default head_dim is not hidden_size / heads it is given.
FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW, **_EXPERTS},
    "qwen2": _WINDOW_FROM_LAYER_1,
    "qwen3": {"head_dim": 8, **_WINDOW_FROM_LAYER_1},
    "qwen3_moe": {
        "head_dim": 8,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],  # a dense layer among those with experts
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "norm_topk_prob": True,
        **_EXPERTS,
    },
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "attn_logit_softcapping": 2.0,  # scores reach 10 here, so that it bends them
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": WINDOW},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "num_local_experts": 4,
        **_EXPERTS,
    },
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    },
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A configuration of `family` with 2 to 4 layers, 4 query and 2 key/value heads."""
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
    """A model of `tiny_config`, the same on every process.

    gpt-oss's sinks are as large as its scores. In float64, experts are computed one by one, since transformers'
    grouped matrix product has no float64; in other dtypes as transformers chooses.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    if dtype == torch.float64 and "num_experts_per_tok" in FAMILY_EXTRAS[family]:
        model.set_experts_implementation("eager")
    return model


def ragged_batch(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels `[B, S]`; labels hold random -100 stretches, and one row's second half has no loss at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    labels = ids.clone()
    if length >= 16:  # in a shorter one nothing would be left that needs attention
        labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
        labels[-1, length // 2 :] = -100
    return ids, labels
