"""Model FLOPs of a training step, and the rate of the GPU they are held against."""

from typing import Any

import torch

# Dense bfloat16 TFLOP/s without sparsity, from NVIDIA's data sheets. The longest name that fits counts.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A10": 125.0,
    "A40": 149.7,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "B200": 2250.0,
}


def peak_tflops(asked: float | None, mixed_precision: str) -> float | None:
    """TFLOP/s of one GPU, or None where it is not known: no GPU, another GPU, or weights that compute in float32."""
    if asked is not None:
        return asked
    if not torch.cuda.is_available() or mixed_precision not in ("bf16", "fp16"):
        return None
    words = torch.cuda.get_device_name().replace("-", " ").split()
    fitting = [name for name in PEAK_TFLOPS if set(name.split()) <= set(words)]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def sequence_flops(model: Any, seq_length: int) -> float:
    """FLOPs of forward and backward over one sequence, without anything that is computed twice.

    6 for each token and parameter that takes part (of experts, the share that a token is sent to; not the embedding), 4
    where it is frozen and has no gradient of its own, and 12 for each pair of a query and a key that it may see, head
    and dimension.
    """
    config = model.config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings()
    seen = set() if config.tie_word_embeddings else {id(embedding.weight)}
    per_token = 0.0
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            share = 1.0
            if ".experts." in f"{name}.":
                experts = getattr(config, "num_local_experts", None) or config.num_experts
                share = config.num_experts_per_tok / experts
            per_token += (6 if p.requires_grad else 4) * num_weights(module, p) * share
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(_visible_pairs(seq_length, window) for window in _windows(config))
    return per_token * seq_length + 12 * pairs * config.num_attention_heads * head_dim


def num_weights(module: Any, parameter: Any) -> int:
    """The numbers in a parameter, also where ZeRO-3 has cut it up or bitsandbytes packed several of them into one."""
    packed = getattr(module, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def _windows(config: Any) -> list[int | None]:
    """Each layer's sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window] * config.num_hidden_layers


def _visible_pairs(length: int, window: int | None) -> float:
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
