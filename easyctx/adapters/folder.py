"""The folder of an adapter, ours or peft's: what it says, and its weights put into a model."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from easyctx.adapters.inject import ADAPTER, put_lora
from easyctx.adapters.quantise import quantised
from easyctx.adapters.settings import check_adapter_package
from easyctx.capability import check_model_path
from easyctx.hub_names import why_no_hub_name

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in the file, from the two wrappers that peft has
_MATRIX = re.compile(r"\.(lora_(?:embedding_)?[AB])(?=\.|$)")


def is_adapter(model: str) -> bool:
    """Whether `model` is an adapter's folder on this machine."""
    return (Path(model) / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: str) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        ValueError: unreadable, no LoRA, a kind of LoRA that is not computed here, or no base model's name.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read: {error}") from error
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise ValueError(f"{folder} is an adapter of the kind {kind}, and only plain LoRA ones are read here")
    if not settings.get("base_model_name_or_path"):
        raise ValueError(f"{path} does not name its base model: write it there as base_model_name_or_path")
    if not (Path(folder) / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}: give the folder of a saved adapter")
    return settings


def base_of(model: str) -> str:
    """The model under an adapter, or the model itself where it is none. ValueError where it is not there."""
    if not is_adapter(model):
        return model
    base = str(read_adapter_config(model)["base_model_name_or_path"])
    is_model = (Path(base) / "config.json").is_file() and not is_adapter(base)
    if not is_model and (Path(base).is_dir() or why_no_hub_name(base)):
        raise ValueError(
            f"the adapter {model} belongs to {base}, which is no folder of a model here: write the model's name or "
            f"folder into its {ADAPTER_CONFIG} as base_model_name_or_path"
        )
    return base


def check_model(model: str) -> None:
    """ValueError unless `model` is that of a model, or an adapter whose base is one and for which peft is there."""
    check_model_path(model)
    if is_adapter(model):
        check_adapter_package(model)
        base_of(model)


def config_source(model: str) -> str:
    """Where a model's configuration is read: an adapter's own, with the RoPE it was trained with, or its base's."""
    return model if (Path(model) / "config.json").is_file() else base_of(model)


def tokenizer_source(model: str) -> str:
    """Where its tokenizer is read: beside the adapter, or with its base."""
    return base_of(model) if is_adapter(model) and not list(Path(model).glob("tokenizer*")) else model


def load_frozen(model: str, config: Any, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> Any:
    """A model to be run and not trained, an adapter on top of its base; quantised ones are on `device` at once."""
    from transformers import AutoModelForCausalLM

    in_4_bits = quantised(quantize, True, dtype, device)
    loaded = AutoModelForCausalLM.from_pretrained(base_of(model), config=config, dtype=dtype, **in_4_bits)
    if is_adapter(model):
        put_adapter(loaded, model)
    return loaded


def put_adapter(model: Any, folder: str, dropout: float = 0.0) -> None:
    """Put the adapter of a folder into the model it was trained beside, in the dtypes that the model's weights have.

    Weights that were trained whole (`modules_to_save`) replace the model's own.

    Raises:
        ValueError: an adapter that does not fit the model.
    """
    check_adapter_package(folder)
    from peft import LoraConfig

    read_adapter_config(folder)
    peft_config = LoraConfig.from_pretrained(folder)
    peft_config.modules_to_save = None  # replaced in place, below
    peft_config.inference_mode, peft_config.lora_dropout = False, dropout
    put_lora(model, peft_config, seed=0)
    load_weights(model, folder)


@torch.no_grad()
def load_weights(model: Any, folder: str) -> None:
    """Set a model's adapters, and what was trained whole, to a folder's values; ValueError where they do not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {name for name in parameters if ".lora_" in name}
    with safe_open(Path(folder) / ADAPTER_WEIGHTS, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  (not a dict)
            name, value = name_in_model(key), tensors.get_tensor(key)
            found = parameters.get(name)
            if found is None or tuple(getattr(found, "ds_shape", found.shape)) != tuple(value.shape):
                there = "no such weight" if found is None else f"one of the shape {tuple(found.shape)}"
                raise ValueError(
                    f"the adapter {folder} does not fit the model: it has {key} of the shape {tuple(value.shape)}, "
                    f"and the model {there}"
                )
            _set(found, value)
            wanted.discard(name)
    if wanted:
        raise ValueError(f"the adapter {folder} lacks {len(wanted)} weights, such as {sorted(wanted)[0]}")


def _set(parameter: Any, value: torch.Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def name_in_model(key: str) -> str:
    """The parameter of a model with adapters whose value a file keeps under `key`."""
    return _MATRIX.sub(rf".\1.{ADAPTER}", key.removeprefix(PREFIX))


def name_in_file(name: str) -> str:
    """The other way."""
    return PREFIX + name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
