"""The figures that TRL's `SFTTrainer` logs beside the loss, over all processes: accuracy, entropy, tokens seen."""

from typing import Any

import torch
import torch.distributed as dist

from easyctx.head import rows_of_a_tile
from easyctx.inputs import IGNORE_INDEX
from easyctx.mesh import Mesh


@torch.no_grad()
def record_figures(trainer: Any, logits: torch.Tensor | None, targets: torch.Tensor, tokens: int, mesh: Mesh) -> None:
    """Add a micro-batch to what `SFTTrainer.log` averages.

    Args:
        trainer: one that keeps `_metrics` as TRL does; for others nothing is done.
        logits: `[B, S/P, V]` of this rank, None where they were never made: then without accuracy and entropy.
        targets: int64 `[B, S/P]`.
        tokens: of the whole batch, without padding; the same on all ranks of a sequence.
    """
    if not hasattr(trainer, "_metrics"):
        return
    mode = "train" if trainer.model.training else "eval"
    figures = trainer._metrics[mode]
    sums = torch.zeros(4, dtype=torch.float64, device=targets.device)
    if logits is not None:
        sums[:3] = _sums(logits.flatten(0, 1), targets.flatten())
    sums[3] = tokens / mesh.sp_size
    dist.all_reduce(sums)
    valid, correct, entropy, seen = sums.tolist()
    if logits is not None:
        figures["mean_token_accuracy"].append(correct / max(valid, 1))
        figures["entropy"].append(entropy / max(valid, 1))
    if mode == "train":
        trainer._total_train_tokens += round(seen)
    figures["num_tokens"] = [trainer._total_train_tokens]


def _sums(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """[tokens with a target, those whose target is the likeliest, sum of entropies in nats]."""
    sums = torch.zeros(3, dtype=torch.float64, device=logits_RV.device)
    scored = (targets_R != IGNORE_INDEX).nonzero().squeeze(1)
    for rows in scored.split(rows_of_a_tile(logits_RV.shape[1])) if len(scored) else ():
        logprob = logits_RV[rows].float().log_softmax(-1)
        correct = logprob.argmax(-1) == targets_R[rows]
        entropy = -(logprob.exp() * logprob).sum(-1)
        sums += torch.stack([torch.ones_like(entropy).sum(), correct.sum(), entropy.sum()])
    return sums
