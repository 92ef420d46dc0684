"""A run's trained parameters, gathered from any engine, and written as an adapter's folder that peft reads."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from easyctx.adapters.folder import ADAPTER_WEIGHTS, base_of, name_in_file
from easyctx.adapters.inject import ADAPTER, whole_names
from easyctx.adapters.settings import AdapterSettings
from easyctx.training.state import trained_parameters


def gather_trained(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters, whole and on the CPU, by their names in the model; only rank 0 keeps them.

    All ranks must call this. Frozen weights are not touched: they are the start model's.
    """
    gathered = {}
    for name, p in trained_parameters(accelerator.unwrap_model(model)).items():
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(p)
        else:
            whole = p.full_tensor() if isinstance(p, DTensor) else p
        if accelerator.is_main_process:
            gathered[name] = whole.detach().to("cpu", copy=True).contiguous()
    return gathered


def write_adapter(
    folder: Path, model: Any, state: dict[str, torch.Tensor], settings: AdapterSettings, start: str
) -> dict[str, torch.Tensor]:
    """Write adapter_config.json, adapter_model.safetensors, and the model's config.json, which holds its RoPE.

    Args:
        folder: new.
        model: the run's, without an engine's wrapper.
        state: of `gather_trained`.
        start: the run's --model: the base, or an adapter of it that was trained on.

    Returns:
        The tensors as they are named in the file.
    """
    folder.mkdir(parents=True)
    base = base_of(start)
    peft_config = lora_config_of(model, settings)
    peft_config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    peft_config.inference_mode = True
    peft_config.save_pretrained(folder)
    named = {name_in_file(name): tensor for name, tensor in state.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return named


def lora_config_of(model: Any, settings: AdapterSettings) -> Any:
    """peft's configuration of a run's adapters, together with what it trained whole."""
    peft_config = copy.deepcopy(model.peft_config[ADAPTER])
    if settings.lora_train:
        peft_config.modules_to_save = whole_names(model, settings.lora_train)
        if "embeddings" in settings.lora_train and model.config.get_text_config().tie_word_embeddings:
            peft_config.ensure_weight_tying = True
    return peft_config
