"""Llama shapes with random weights, made where they run, and the tokenizer that they lack."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SHAPES: dict[str, dict[str, int]] = {
    "1B": dict(num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, vocab_size=128256),
    "8B": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=128256),
    "tiny": dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, vocab_size=256),
}  # fmt: skip


class NoText:
    """A tokenizer that ends nothing: every answer has its full length."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return ""


def make_config(shape: dict[str, int]) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return LlamaConfig(**shape, max_position_embeddings=1 << 20, rope_parameters=rope)


def make_model(shape: dict[str, int], device: torch.device) -> PreTrainedModel:
    """The model in bfloat16 on a GPU, in float32 on a CPU; the same on every process."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return LlamaForCausalLM._from_config(make_config(shape), dtype=dtype).eval()


def quantise_layers(model: Any, compute: torch.dtype, double_quant: bool) -> None:
    """Put the linear layers of a model's decoder into 4 bits (NF4), one after the other, where they are.

    As `from_pretrained` with the settings of `easyctx.adapters.quantise` leaves them.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.get_decoder().layers:
        for name, module in list(layer.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            kind = dict(quant_type="nf4", compress_statistics=double_quant, quant_storage=compute)
            small = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=compute, device="meta", **kind
            )
            weight = module.weight.data
            small.weight = Params4bit(weight, requires_grad=False, module=small, **kind).to(weight.device)
            parent, _, own_name = name.rpartition(".")
            setattr(layer.get_submodule(parent), own_name, small)
    model.is_loaded_in_4bit = True  # what peft asks for
