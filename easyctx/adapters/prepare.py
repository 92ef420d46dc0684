"""A run's model with its adapters: new ones, or those of a folder that is trained on."""

from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers import AutoConfig

from easyctx.adapters.folder import config_source, is_adapter, put_adapter, read_adapter_config
from easyctx.adapters.fused import fuse_lora
from easyctx.adapters.inject import lora_config, put_lora, set_adapter_dtype, train_whole
from easyctx.adapters.settings import LORA_TRAIN, AdapterSettings
from easyctx.engine import manages_master_weights
from easyctx.memory.shape import MemoryShape

# What peft calls the experts' stacked matrices, and the linear layers that they are elsewhere.
OF_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def adopt_adapter(config: Any) -> None:
    """Where a run's --model is an adapter, take its rank and the rest from there: that adapter is trained on.

    config: a `TrainConfig`, or a plan's arguments, which have no alpha.

    Raises:
        ValueError: flags that ask for another adapter; one of which parts are trained that no flag trains.
    """
    if not is_adapter(config.model):
        return
    read = read_adapter_config(config.model)
    found = {
        "lora_r": int(read["r"]),
        "lora_alpha": float(read["lora_alpha"]),
        "lora_targets": _targets(config.model, read),
        "lora_train": _kinds(config.model, read.get("modules_to_save") or []),
    }
    for name, value in found.items():
        asked = getattr(config, name, None)
        if asked and value is not None and _sorted(asked) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {_words(asked)}, and the adapter {config.model}, which would be "
                f"trained on, has {_words(value)}: leave the flag out, or start from what `easyctx merge` makes of it"
            )
        setattr(config, name, value)


def _targets(folder: str, read: dict[str, Any]) -> list[str] | None:
    """The names of `--lora-targets` that an adapter was made with; None where it says so by a pattern.

    Of a mixture, peft takes gate_proj, up_proj and down_proj for parameters of the experts. Where no layer is dense,
    no flag asks for these names, but an adapter that was made elsewhere may have them.
    """
    targets, parameters = read.get("target_modules"), read.get("target_parameters")
    if not isinstance(targets, list):
        return None
    if not parameters or not _is_mixture(folder):
        return sorted(targets)
    of_experts = [OF_EXPERTS.get(name.rsplit(".", 1)[-1], (name,)) for name in parameters]
    return sorted({*targets, *chain.from_iterable(of_experts)})


def _is_mixture(adapter: str) -> bool:
    try:
        config = AutoConfig.from_pretrained(config_source(adapter))
    except OSError:  # whoever loads the model says so
        return False
    return MemoryShape.from_config(config).is_mixture


def add_adapters(model: Any, config: Any, accelerator: Accelerator) -> None:
    """Freeze the model of a run and give it what is to be trained; nothing where all weights are.

    Adapters, and what is trained whole, are float32 beside half-precision weights, unless the engine keeps such copies.
    """
    settings = AdapterSettings.from_config(config)
    if not settings.is_on:
        return
    if is_adapter(config.model):
        put_adapter(model, config.model, settings.lora_dropout)
    else:
        put_lora(model, lora_config(model, settings), config.seed)
    if accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        fuse_lora(model)  # engines that share weights out put them together as modules are called
    if manages_master_weights(accelerator):
        train_whole(model, settings.lora_train, None)
    else:
        exact = torch.float64 if model.dtype == torch.float64 else torch.float32
        set_adapter_dtype(model, exact, casts_inputs=accelerator.mixed_precision == "no")
        train_whole(model, settings.lora_train, exact)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    begun = f"goes on with the adapter {config.model}" if is_adapter(config.model) else "trains a new adapter"
    whole = f", and the {' and '.join(settings.lora_train)}" if settings.lora_train else ""
    accelerator.print(
        f"easyctx: {begun}: LoRA of rank {settings.lora_r}, alpha {settings.alpha:g}{whole}; {trained:,} parameters "
        "are trained"
    )


def _kinds(folder: str, modules: list[str]) -> list[str]:
    """The kinds of `--lora-train` that these names of modules belong to."""
    kinds = {
        "embeddings" if name.startswith("embed") else "norms" if name.endswith("norm") else name for name in modules
    }
    if unknown := sorted(kinds - set(LORA_TRAIN)):
        raise ValueError(
            f"the adapter {folder} also trained {', '.join(unknown)}, which no run trains on: start from its merged "
            "weights (`easyctx merge`)"
        )
    return sorted(kinds)


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else f"{value:g}"
