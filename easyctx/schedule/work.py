"""The blocks of a plan, run on this rank's kernel: what every schedule does between its messages."""

from collections.abc import Iterable

import torch

from easyctx.band import Block
from easyctx.kernel import Saved
from easyctx.schedule.base import Attention
from easyctx.schedule.merge import Accumulator


def attend(
    total: Accumulator,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    blocks: Iterable[Block],
    call: Attention,
) -> None:
    """Fold the attention over these blocks into `total`."""
    for block in blocks:
        q, k, v = q_BSHD[block.rows, block.q], k_BSKD[block.rows, block.k], v_BSKD[block.rows, block.k]
        if block.cuts:
            out, lse = call.kernel.forward_packed(q, k, v, block.cuts, block.band, call.score)
        else:
            out, lse = call.kernel.forward(q, k, v, block.band, call.score)
        total.add(out, lse, block.q, block.rows)


def differentiate(
    dq_BSHD: torch.Tensor,
    dkv: torch.Tensor,
    dout_BSHD: torch.Tensor,
    saved: Saved,
    blocks: Iterable[Block],
    call: Attention,
) -> None:
    """Add the blocks' gradients to dq and to dkv `[2, B, S, K, D]`, both in the exact dtype."""
    for block in blocks:
        part, dout = saved.of_block(block.rows, block.q, block.k), dout_BSHD[block.rows, block.q]
        if block.cuts:
            dq, dk, dv = call.kernel.backward_packed(dout, part, block.cuts, block.band, call.score)
        else:
            dq, dk, dv = call.kernel.backward(dout, part, block.band, call.score)
        dq_BSHD[block.rows, block.q] += dq
        dkv[0][block.rows, block.k] += dk
        dkv[1][block.rows, block.k] += dv


def new_dkv(k_BSKD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros `[2, B, S, K, D]`: sums of dk and dv, one buffer so that they are one message."""
    return torch.zeros((2, *k_BSKD.shape), dtype=dtype, device=k_BSKD.device)


def new_dq(q_BSHD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros `[B, S, H, D]`."""
    return torch.zeros(q_BSHD.shape, dtype=dtype, device=q_BSHD.device)
