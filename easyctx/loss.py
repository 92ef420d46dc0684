"""The loss: a sum over valid tokens and their number, so that the mean can be taken over everything at once."""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from easyctx.inputs import IGNORE_INDEX


def token_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the tokens that have a target.

    Args:
        logits: `[B, S, V]`, any floating dtype; the softmax is taken in float32 (float64 for float64).
        targets: int64 `[B, S]`, shifted already; -100 where there is no loss. A shard without any target gives a
            zero that still runs backward, as the other ranks of its group need it to.
    """
    flat = logits.flatten(0, -2)
    exact = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(exact, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def global_sum(value: torch.Tensor | float, device: torch.device | str) -> float:
    """The sum of `value` over all processes of the run."""
    total = torch.as_tensor(value, dtype=torch.float64).detach().to(device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)


def num_targets(targets: torch.Tensor) -> int:
    """How many tokens of `targets` have a loss."""
    return int((targets != IGNORE_INDEX).sum())
