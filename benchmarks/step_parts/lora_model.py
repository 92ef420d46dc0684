"""A random model with adapters, for the benchmarks of LoRA."""

import gc
from typing import Any

import torch
from shared_parts.random_models import quantise_layers
from transformers import LlamaConfig, LlamaForCausalLM

from easyctx.adapters.prepare import add_adapters
from easyctx.training.model import compute_dtype, weight_dtype


def make_random(hf_config: LlamaConfig, config: Any, accelerator: Any) -> Any:
    """The model with its adapters, all of it on the accelerator's device."""
    dtype = weight_dtype(config.dtype, accelerator, is_frozen=True)
    torch.manual_seed(config.seed)
    with accelerator.device:
        model: Any = LlamaForCausalLM._from_config(hf_config, dtype=dtype)
    if config.quantize:
        quantise_layers(model, compute_dtype(dtype, accelerator), config.double_quant)
    add_adapters(model, config, accelerator)
    model.train()
    release()
    return model.to(accelerator.device)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
