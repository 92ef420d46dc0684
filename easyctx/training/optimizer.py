"""AdamW and the course of its learning rate, whose only source is the command line."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator

from easyctx.training.config import TrainConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed exchanges PyTorch's for its own CPU AdamW where the optimizer is offloaded."""
    trained = [p for p in parameters if p.requires_grad]
    settings: dict[str, Any] = dict(
        lr=config.learning_rate,
        betas=(config.adam_betas[0], config.adam_betas[1]),
        weight_decay=config.weight_decay,
    )
    if config.optimizer == "adamw":
        # fused: without the temporary copies that the default makes on a GPU
        return torch.optim.AdamW(trained, fused=torch.cuda.is_available(), **settings)
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return kinds[config.optimizer](trained, **settings)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0): a linear warm-up, then constant, or down to zero at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = config.max_train_steps - config.warmup_steps
    done = (step - config.warmup_steps) / max(left, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]
    return config.learning_rate * factor


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(model: Any, max_grad_norm: float, accelerator: Accelerator) -> Any:
    """Clip the global gradient norm and return what it was (0 only measures it). DeepSpeed clips by itself."""
    return accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
