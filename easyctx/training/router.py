"""The auxiliary loss of mixtures of experts in the train loop."""

from typing import Any

import torch

from easyctx.inputs import is_real_token
from easyctx.mesh import Mesh
from easyctx.moe import router_loss_share


def router_objective(
    outputs: Any, model_config: Any, parallel_mode: str, counted: tuple[torch.Tensor, int], mesh: Mesh
) -> torch.Tensor | float:
    """What a micro-batch adds to the objective for balanced experts; 0 where the model's configuration asks for none.

    It asks by `output_router_logits` and `router_aux_loss_coef`, as transformers' own loss does. The loss is one
    number for each micro-batch over all of its sequence's ranks, and a step takes the mean over micro-batches and
    data-parallel ranks. Scaled for engines that average gradients over all processes, and for accelerate's average
    over micro-batches.

    Args:
        outputs: of the model on this rank's shard.
        model_config: its configuration.
        counted: int64 `[B]`, how many tokens of each row are not padding; and the length of the batch, before its
            shards are padded.
    """
    text = model_config.get_text_config(decoder=True)
    router_logits = getattr(outputs, "router_logits", None)
    if not (getattr(text, "output_router_logits", False) and router_logits):
        return 0.0
    row_lengths, length = counted
    rank = (mesh.sp_rank, mesh.sp_size, mesh.ring_degree)
    real = is_real_token(parallel_mode, length, *rank, row_lengths=row_lengths)
    experts = getattr(text, "num_local_experts", None) or text.num_experts
    share = router_loss_share(router_logits, experts, text.num_experts_per_tok, real, mesh.sp_group)
    return text.router_aux_loss_coef * share * mesh.sp_size
