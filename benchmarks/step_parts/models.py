"""The models of benchmarks/train_step.py, and the work of a step on them."""

from typing import Any

import torch
from transformers import LlamaConfig

from easyctx.memory.budget import MemoryShape
from step_parts.shapes import MODELS

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}  # dense bfloat16


def model_config(name: str, layers: int | None, length: int) -> LlamaConfig:
    sizes: dict[str, Any] = MODELS[name]
    return LlamaConfig(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=layers or sizes["layers"],
        num_attention_heads=sizes["heads"][0],
        num_key_value_heads=sizes["heads"][1],
        vocab_size=sizes["vocab"],
        max_position_embeddings=length,
        use_cache=False,
    )


def model_flops(config: LlamaConfig, length: int) -> float:
    """Of one sequence, forward and backward, causal attention counted once, nothing recomputed."""
    shape = MemoryShape.from_config(config)
    matrices = shape.parameters - shape.vocab * shape.hidden  # looking a token up takes none
    return 6 * matrices * length + 6 * shape.num_layers * shape.q_width * length**2


def peak_flops() -> float | None:
    """Of this process's GPU; None where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
