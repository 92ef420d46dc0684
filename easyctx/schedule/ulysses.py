"""Ulysses (arXiv 2309.14509): all-to-alls trade the sequence for heads, so each rank sees every token of some heads.

Between the two exchanges a rank attends over the whole sequence. Shapes: P ranks, H query heads, K key/value heads;
a rank gets H / P query heads and K / P key/value heads, or one, copied to P / K ranks, where there are fewer than
ranks. It gets them a group after the other (`head_exchange.py`): one group is computed while the next one comes and
the last one's results leave.
"""

from dataclasses import replace

import torch

from easyctx.kernel import Gradients, Saved
from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.head_exchange import HeadGroups, ToHeads, ToSequence


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
        groups = HeadGroups(q_BSHD.shape[2], k_BSKD.shape[2], q_BSHD.shape[1] * axis.size, axis.size)
        keys = [_spread(t, axis.size) for t in (k_BSKD, v_BSKD)]
        back = ToSequence(axis, groups)
        for group, (q, k, v) in ToHeads(axis, groups, of_queries=[q_BSHD], of_keys=keys):
            out, lse_BHS = self.inner.forward(q, k, v, call)
            lse_BSH1 = lse_BHS.transpose(1, 2).unsqueeze(-1)
            back.send(group, of_queries=[out if call.unrounded else out.to(q.dtype), lse_BSH1])
        out, lse = back.collect()
        return out, lse.squeeze(-1).transpose(1, 2)

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        axis, kv_heads = call.ulysses, saved.k_BSKD.shape[2]
        if axis.size == 1:
            return self.inner.backward(dout_BSHD, saved, call)
        groups = HeadGroups(saved.q_BSHD.shape[2], kv_heads, dout_BSHD.shape[1] * axis.size, axis.size)
        keys = [_spread(t, axis.size) for t in (saved.k_BSKD, saved.v_BSKD)]
        queries = [saved.q_BSHD, saved.out_BSHD, dout_BSHD]
        lse_BSH1 = saved.lse_BHS.transpose(1, 2).unsqueeze(-1)
        copied = keys[0].shape[2] > kv_heads  # copies are summed before they are rounded
        key_dtype = saved.lse_BHS.dtype if copied else saved.k_BSKD.dtype
        call = replace(call, unrounded=copied)
        back = ToSequence(axis, groups)
        for group, (q, out, dout, lse, k, v) in ToHeads(axis, groups, of_queries=[*queries, lse_BSH1], of_keys=keys):
            whole = Saved(q, k, v, out, lse.squeeze(-1).transpose(1, 2))
            dq, dk, dv = self.inner.backward(dout, whole, call)
            back.send(group, of_queries=[dq.to(q.dtype)], of_keys=[dk.to(key_dtype), dv.to(key_dtype)])
        dq, dk, dv = back.collect()
        return dq, _gather_copies(dk, kv_heads), _gather_copies(dv, kv_heads)


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
