"""A model's output head, called through the model's own forward but doing something else for the length of one call.

So logits need not exist all at once, and engines that gather weights as modules are called (ZeRO-3, FSDP2) do as ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

TILE_ELEMENTS = 1 << 26  # logits in memory at a time: 256 MiB in float32


def rows_of_a_tile(vocab_size: int) -> int:
    """How many tokens' logits make a tile."""
    return max(1, TILE_ELEMENTS // vocab_size)


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside an engine's wrapper (DDP's and DeepSpeed's hold it as `module`)."""
    return getattr(model, "module", model)


def post_process(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some families do to logits after the head: Granite divides, Cohere scales, Gemma caps."""
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@contextmanager
def replaced_forward(head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """`head` computes `forward` instead of its own; hooks around its call stay."""
    original, overridden = head.forward, "forward" in vars(head)
    head.forward = forward
    try:
        yield
    finally:
        if overridden:
            head.forward = original
        else:
            del head.forward
