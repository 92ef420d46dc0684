"""Ulysses (arXiv 2309.14509): all-to-alls trade the sequence for heads, so each rank sees every token of some heads.

Between the two exchanges a rank attends over the whole sequence. Shapes: P ranks, H query heads, K key/value heads;
a rank gets H / P query heads and K / P key/value heads, or one, copied to P / K ranks, where there are fewer than
ranks.
"""

import torch

from easyctx.kernel import Gradients, Saved
from easyctx.mesh import Axis
from easyctx.schedule.base import Attention, Schedule


class Ulysses(Schedule):
    """The exchange around an inner schedule, which sees `H / P` heads of all tokens of the Ulysses axis' ranks.

    With a ring inside this is USP (arXiv 2405.07719); with a ring of one rank it is Ulysses alone. Needs heads to
    share out: `check_heads` says which degrees a model allows.
    """

    name = "ulysses"

    def __init__(self, inner: Schedule) -> None:
        self.inner, self.layouts = inner, inner.layouts

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        axis = call.ulysses
        if axis.size == 1:
            return self.inner.forward(q_BSHD, k_BSKD, v_BSKD, call)
        check_heads(q_BSHD.shape[2], k_BSKD.shape[2], axis.size)
        q, k, v = _to_heads(axis, q_BSHD, _spread(k_BSKD, axis.size), _spread(v_BSKD, axis.size))
        out, lse_BHS = self.inner.forward(q, k, v, call)
        [out] = _to_sequence(axis, out if call.unrounded else out.to(q.dtype))
        [lse] = _to_sequence(axis, lse_BHS.transpose(1, 2).unsqueeze(-1))
        return out, lse.squeeze(-1).transpose(1, 2)

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        axis, kv_heads = call.ulysses, saved.k_BSKD.shape[2]
        if axis.size == 1:
            return self.inner.backward(dout_BSHD, saved, call)
        k_BSKD, v_BSKD = (_spread(t, axis.size) for t in (saved.k_BSKD, saved.v_BSKD))
        q, k, v, out, dout = _to_heads(axis, saved.q_BSHD, k_BSKD, v_BSKD, saved.out_BSHD, dout_BSHD)
        [lse] = _to_heads(axis, saved.lse_BHS.transpose(1, 2).unsqueeze(-1))
        whole = Saved(q, k, v, out, lse.squeeze(-1).transpose(1, 2))
        dq, dk, dv = self.inner.backward(dout, whole, call)
        [dq] = _to_sequence(axis, dq.to(saved.q_BSHD.dtype))
        # Copies are summed before they are rounded.
        dtype = saved.lse_BHS.dtype if k_BSKD.shape[2] > kv_heads else k_BSKD.dtype
        dk, dv = (_gather_copies(t, kv_heads) for t in _to_sequence(axis, dk.to(dtype), dv.to(dtype)))
        return dq, dk, dv


def check_heads(q_heads: int, kv_heads: int, degree: int) -> None:
    """ValueError, with the degrees that would do, if these heads cannot be shared out to `degree` ranks."""
    if not _splits(q_heads, kv_heads, degree):
        valid = [p for p in range(1, q_heads + 1) if _splits(q_heads, kv_heads, p)]
        raise ValueError(
            f"Ulysses cannot share {q_heads} query and {kv_heads} key/value heads out to {degree} ranks: use a "
            f"Ulysses degree of {', '.join(map(str, valid))} (ulysses_attn: the sequence-parallel degree; usp_attn: "
            "that over the ring degree), or a ring mode, which takes any"
        )


def _splits(q_heads: int, kv_heads: int, degree: int) -> bool:
    return q_heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)


def _spread(x_BSKD: torch.Tensor, degree: int) -> torch.Tensor:
    """Key/value heads copied until every rank has one: neighbouring ranks hold the query heads that share it."""
    copies = max(degree // x_BSKD.shape[2], 1)
    return x_BSKD.repeat_interleave(copies, dim=2) if copies > 1 else x_BSKD


def _gather_copies(x_BSKD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The adjoint of `_spread`: gradients of copies summed."""
    return x_BSKD.unflatten(2, (kv_heads, -1)).sum(3) if x_BSKD.shape[2] > kv_heads else x_BSKD


def _to_heads(axis: Axis, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, S/P, heads, D] of this rank's tokens -> [B, S, heads/P, D] of this rank's heads, in one message."""
    counts = [t.shape[2] // axis.size for t in tensors]
    # To rank r go the r-th share of the heads of every tensor.
    send = torch.cat([t.unflatten(2, (axis.size, -1)) for t in tensors], dim=3)  # [B, S/P, P, heads/P, D]
    # [P, B, S/P, heads/P, D], by the rank whose tokens they are
    received = axis.transport.all_to_all(send.movedim(2, 0))
    whole = received.movedim(0, 1).flatten(1, 2)
    return list(whole.split(counts, dim=2))


def _to_sequence(axis: Axis, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The inverse: [B, S, heads/P, D] of this rank's heads -> [B, S/P, heads, D] of this rank's tokens."""
    counts = [t.shape[2] for t in tensors]
    send = torch.cat(tensors, dim=2).unflatten(1, (axis.size, -1))  # [B, P, S/P, heads/P, D]
    # [P, B, S/P, heads/P, D], by the rank whose heads they are
    received = axis.transport.all_to_all(send.movedim(1, 0))
    parts = received.split(counts, dim=3)
    return [part.movedim(0, 2).flatten(2, 3) for part in parts]
