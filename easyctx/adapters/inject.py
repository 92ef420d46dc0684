"""Adapters put into a model where it is: its class, names and own code stay, and some layers have a B A beside them.

Nothing is wrapped, so that whatever reaches into a transformers model (attention, memory, head, engines) finds it as
it was. What `--lora-train` names is trained where it is, too, and needs no second copy.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from easyctx.adapters.settings import AdapterSettings

ADAPTER = "default"  # peft's name of a model's only adapter


def linear_names(model: Any) -> list[str]:
    """The names of the decoder's linear layers, such as q_proj; the output head is none of them."""
    decoder = model.get_decoder()
    return sorted(
        {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    )


def target_names(model: Any, settings: AdapterSettings) -> list[str]:
    """The names of the layers to adapt.

    Raises:
        ValueError: a name that is no linear layer of this model, or a model that has none.
    """
    there = linear_names(model)
    unknown = sorted(set(settings.lora_targets or ()) - set(there))
    if unknown or not there:
        raise ValueError(
            f"--lora-targets names {', '.join(unknown) or 'no layer'}, and the linear layers of this "
            f"{model.config.model_type} model are {', '.join(there) or 'none'}: give some of these, or leave it out to "
            "adapt all"
        )
    return sorted(settings.lora_targets or there)


def check_targets(model_config: Any, settings: AdapterSettings) -> None:
    """ValueError where the layers to adapt are not there; looks at a model without weights."""
    if settings.is_on:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
        with torch.device("meta"):  # and not by from_config, in which ZeRO-3 would want weights to shard
            target_names(kind(copy.deepcopy(model_config)), settings)


def lora_config(model: Any, settings: AdapterSettings) -> Any:
    """peft's configuration of the adapters that these settings ask for."""
    from peft import LoraConfig

    alpha: Any = settings.alpha  # peft's type is int, and what it computes with it takes both
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_names(model, settings),
        task_type="CAUSAL_LM",
    )


def put_lora(model: Any, peft_config: Any, seed: int) -> None:
    """Freeze a model and put adapters into it, which start as peft starts them: the model's outputs stay the same.

    seed: of the adapters' random half, so that it is the same on every rank.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER)


def train_whole(model: Any, kinds: tuple[str, ...], dtype: torch.dtype | None) -> None:
    """Train embeddings or norms themselves, beside the adapters.

    Args:
        dtype: that their weights are to have; None leaves them. What they give out stays in the dtype it had, so that a
            trained embedding does not make the whole residual stream a wider one.
    """
    for module in whole_modules(model, kinds):
        narrow = module.weight.dtype
        for p in module.parameters(recurse=False):
            p.requires_grad_(True)
        if dtype is not None and dtype != narrow:
            module.weight.data = module.weight.data.to(dtype)
            module.register_forward_hook(lambda _, __, out, narrow=narrow: out.to(narrow))


def whole_modules(model: Any, kinds: tuple[str, ...]) -> Iterator[Any]:
    """The modules of these kinds of `--lora-train`."""
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if "embeddings" in kinds and module is embedding:
            yield module
        if "norms" in kinds and is_norm(module) and getattr(module, "weight", None) is not None:
            yield module


def whole_names(model: Any, kinds: tuple[str, ...]) -> list[str]:
    """Their names as peft's `modules_to_save` wants them: the last part of each."""
    wanted = {id(module) for module in whole_modules(model, kinds)}
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if id(module) in wanted})


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def set_adapter_dtype(model: Any, dtype: torch.dtype, casts_inputs: bool) -> None:
    """Give the adapters' matrices a dtype.

    casts_inputs: whether a layer's input is put into it, too. Under autocast that would only be a copy of the whole
        input, as wide as the matrices' dtype, which autocast narrows again.
    """
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = p.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = casts_inputs
