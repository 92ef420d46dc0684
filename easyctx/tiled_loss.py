"""Cross-entropy without logits: tile by tile of the output head, its gradients made while a tile is there.

At a million tokens and 128K words the logits of one sequence would be half a terabyte. Here a tile of them exists at a
time, once, in the forward; the backward only scales what was kept, the gradient of the hidden states and of the head's
weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from easyctx.head import inner_model, replaced_forward, rows_of_a_tile
from easyctx.inputs import IGNORE_INDEX
from easyctx.kernel import exact_dtype

# A fused tile is its logits alone, in the dtype of the matrix product; another one has them exactly as well, and their
# exponentials.
MORE_WHERE_FUSED = 4


def can_tile(model: nn.Module) -> bool:
    """Whether the model's head is a plain matrix whose logits are at most capped (not scaled, no bias, no adapter)."""
    inner = inner_model(model)
    head, config = inner.get_output_embeddings(), inner.config.get_text_config()
    is_scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in ("logits_scaling", "logit_scale"))
    is_matrix = isinstance(head, nn.Linear) and head.bias is None and head.weight.is_floating_point()
    return is_matrix and not is_scaled


@contextmanager
def loss_in_head(model: nn.Module, targets: torch.Tensor) -> Iterator[None]:
    """Within it, `model(…).logits` is the cross-entropy summed over the tokens that have a target: `[1, 1, 1]`.

    Args:
        model: one that `can_tile`, also wrapped by an engine; called once.
        targets: int64 `[B, S]` of the call's tokens, shifted already, -100 where there is no loss. Without any the
            loss is a zero that still runs backward.
    """
    inner = inner_model(model)
    head, config = inner.get_output_embeddings(), inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight = head.weight
        if torch.is_autocast_enabled(hidden.device.type):
            autocast = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(autocast), weight.to(autocast)
        loss = _TiledCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), softcap)
        return loss.view(1, 1, 1)

    if softcap:  # the model would cap the loss
        config.final_logit_softcapping = None
    try:
        with replaced_forward(head, forward):
            yield
    finally:
        if softcap:
            config.final_logit_softcapping = softcap


class _TiledCrossEntropy(torch.autograd.Function):
    """Shapes: R tokens, D hidden size, V words."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: torch.Tensor, weight_VD: torch.Tensor, targets_R: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        exact = exact_dtype(hidden_RD.dtype)
        total = hidden_RD.new_zeros((), dtype=exact)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_RD = torch.zeros_like(hidden_RD) if needs_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None
        # Only tokens with a target have a loss: a prompt's logits are not made at all.
        scored = (targets_R != IGNORE_INDEX).nonzero().squeeze(1)
        tile = rows_of_a_tile(weight_VD.shape[0]) * (MORE_WHERE_FUSED if _is_fused(hidden_RD) else 1)
        for rows in scored.split(tile) if len(scored) else ():
            hidden = hidden_RD[rows]
            loss, dlogits = _tile(hidden, weight_VD, targets_R[rows], softcap, exact)
            total += loss
            if dhidden_RD is not None:
                dhidden_RD[rows] = dlogits @ weight_VD
            if dweight_VD is not None:
                _add_product(dweight_VD, dlogits.T, hidden)
            del hidden, dlogits  # not beside the next tile
        ctx.save_for_backward(dhidden_RD, dweight_VD)
        ctx.dtypes = hidden_RD.dtype, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        # In place: what was kept is of no use to anything else, and the head's gradient is large in float32.
        scaled = [
            None if kept is None else kept.mul_(grads[0]).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None


def _is_fused(hidden: torch.Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype != torch.float64


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right; total in the exact dtype, to which a GPU's matrix units add without rounding before."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total += left @ right


def _tile(
    hidden: torch.Tensor, weight_VD: torch.Tensor, targets: torch.Tensor, softcap: float | None, exact: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of these tokens, summed, and its gradient by their logits `[R, V]`, in the dtype of hidden."""
    logits = hidden @ weight_VD.T
    if _is_fused(hidden):
        from easyctx.tiled_loss_cuda import loss_and_gradient_

        return loss_and_gradient_(logits, targets, softcap).sum(), logits
    logits = logits.to(exact)
    slope = None
    if softcap:
        capped = torch.tanh(logits / softcap)
        logits, slope = capped * softcap, 1 - capped.square()
    lse = logits.logsumexp(-1)
    wanted = logits.gather(-1, targets[:, None]).squeeze(-1)
    loss = (lse - wanted).sum()
    dlogits = logits.sub_(lse[:, None]).exp_()
    dlogits.scatter_add_(-1, targets[:, None], -torch.ones_like(wanted)[:, None])
    if slope is not None:
        dlogits *= slope
    return loss, dlogits.to(hidden.dtype)
