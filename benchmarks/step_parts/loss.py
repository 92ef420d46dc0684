"""The fused loss of the methods that benchmarks/train_step.py compares easyctx with: Liger's where it is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from easyctx.head import inner_model, replaced_forward
from easyctx.inputs import IGNORE_INDEX
from easyctx.training import objective


def use_rivals_loss(device: torch.device) -> str:
    """Have the tiled loss of this process be Liger's, and return whose it is now."""
    if device.type != "cuda":
        return "easyctx (Liger's runs on GPUs only)"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return "easyctx (liger-kernel is not installed)"
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")

    @contextmanager
    def loss_in_head(model: nn.Module, targets: torch.Tensor) -> Iterator[None]:
        """As `easyctx.tiled_loss.loss_in_head`."""
        head = inner_model(model).get_output_embeddings()

        def forward(hidden: torch.Tensor) -> Any:
            weight = head.weight
            if torch.is_autocast_enabled("cuda"):
                dtype = torch.get_autocast_dtype("cuda")
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            return fused(weight, hidden.flatten(0, 1), targets.flatten()).view(1, 1, 1)

        with replaced_forward(head, forward):
            yield

    objective.loss_in_head = loss_in_head
    return "Liger"
