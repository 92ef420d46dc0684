"""Ulysses (arXiv 2309.14509): all-to-alls trade the sequence for heads, so each rank sees every token of some heads.

Between the two exchanges a rank runs one ordinary kernel call over the whole sequence. Shapes: P ranks, H query
heads, K key/value heads; a rank gets H / P query heads and K / P key/value heads, or one, copied to P / K ranks,
where there are fewer than ranks.
"""

import torch
import torch.distributed as dist

from easyctx.band import CAUSAL, Band
from easyctx.kernel import Gradients, Saved
from easyctx.layout import CONTIGUOUS
from easyctx.mesh import Mesh
from easyctx.schedule.base import Attention, Schedule


class Ulysses(Schedule):
    """Needs heads to share out: `check_heads` says which degrees a model allows."""

    name = "ulysses"
    layouts = (CONTIGUOUS,)

    def check_heads(self, q_heads: int, kv_heads: int, sp_size: int) -> None:
        if not _splits(q_heads, kv_heads, sp_size):
            valid = [p for p in range(1, q_heads + 1) if _splits(q_heads, kv_heads, p)]
            raise ValueError(
                f"Ulysses cannot share {q_heads} query and {kv_heads} key/value heads out to {sp_size} ranks: "
                f"use a sequence-parallel degree of {', '.join(map(str, valid))}, or a ring mode, which takes any"
            )

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mesh = call.mesh
        self.check_heads(q_BSHD.shape[2], k_BSKD.shape[2], mesh.sp_size)
        q, k, v = _to_heads(mesh, q_BSHD, _spread(k_BSKD, mesh.sp_size), _spread(v_BSKD, mesh.sp_size))
        out, lse_BHS = call.kernel.forward(q, k, v, _band(call, q.shape[1]), call.scale)
        [out] = _to_sequence(mesh, out)
        [lse] = _to_sequence(mesh, lse_BHS.transpose(1, 2).unsqueeze(-1))
        return out, lse.squeeze(-1).transpose(1, 2)

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        mesh, kv_heads = call.mesh, saved.k_BSKD.shape[2]
        k_BSKD, v_BSKD = (_spread(t, mesh.sp_size) for t in (saved.k_BSKD, saved.v_BSKD))
        q, k, v, out, dout = _to_heads(mesh, saved.q_BSHD, k_BSKD, v_BSKD, saved.out_BSHD, dout_BSHD)
        [lse] = _to_heads(mesh, saved.lse_BHS.transpose(1, 2).unsqueeze(-1))
        whole = Saved(q, k, v, out, lse.squeeze(-1).transpose(1, 2))
        dq, dk, dv = call.kernel.backward(dout, whole, _band(call, q.shape[1]), call.scale)
        if k_BSKD.shape[2] > kv_heads:  # copies are summed, in the exact dtype
            dk, dv = dk.to(saved.lse_BHS.dtype), dv.to(saved.lse_BHS.dtype)
        else:
            dk, dv = dk.to(saved.k_BSKD.dtype), dv.to(saved.k_BSKD.dtype)
        [dq] = _to_sequence(mesh, dq.to(saved.q_BSHD.dtype))
        dk, dv = (_gather_copies(t, kv_heads).to(saved.k_BSKD.dtype) for t in _to_sequence(mesh, dk, dv))
        return dq, dk, dv


def _splits(q_heads: int, kv_heads: int, sp_size: int) -> bool:
    return q_heads % sp_size == 0 and (kv_heads % sp_size == 0 or sp_size % kv_heads == 0)


def _band(call: Attention, seq_len: int) -> Band:
    if call.window is None or call.window >= seq_len:
        return CAUSAL
    return Band(low=-(call.window - 1), high=0)


def _spread(x_BSKD: torch.Tensor, sp_size: int) -> torch.Tensor:
    """Key/value heads copied until every rank has one: neighbouring ranks hold the query heads that share it."""
    copies = max(sp_size // x_BSKD.shape[2], 1)
    return x_BSKD.repeat_interleave(copies, dim=2) if copies > 1 else x_BSKD


def _gather_copies(x_BSKD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The adjoint of `_spread`: gradients of copies summed."""
    return x_BSKD.unflatten(2, (kv_heads, -1)).sum(3) if x_BSKD.shape[2] > kv_heads else x_BSKD


def _to_heads(mesh: Mesh, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, S/P, heads, D] of this rank's tokens -> [B, S, heads/P, D] of this rank's heads, in one message."""
    counts = [t.shape[2] // mesh.sp_size for t in tensors]
    # To rank r go the r-th share of the heads of every tensor.
    send = torch.cat([t.unflatten(2, (mesh.sp_size, -1)) for t in tensors], dim=3)  # [B, S/P, P, heads/P, D]
    received = _exchange(mesh, send.movedim(2, 0))  # [P, B, S/P, heads/P, D], by the rank whose tokens they are
    whole = received.movedim(0, 1).flatten(1, 2)
    return list(whole.split(counts, dim=2))


def _to_sequence(mesh: Mesh, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The inverse: [B, S, heads/P, D] of this rank's heads -> [B, S/P, heads, D] of this rank's tokens."""
    counts = [t.shape[2] for t in tensors]
    send = torch.cat(tensors, dim=2).unflatten(1, (mesh.sp_size, -1))  # [B, P, S/P, heads/P, D]
    received = _exchange(mesh, send.movedim(1, 0))  # [P, B, S/P, heads/P, D], by the rank whose heads they are
    parts = received.split(counts, dim=3)
    return [part.movedim(0, 2).flatten(2, 3) for part in parts]


def _exchange(mesh: Mesh, send: torch.Tensor) -> torch.Tensor:
    """The r-th slice of dim 0 goes to rank r; the r-th slice of the result came from it."""
    send = send.contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=mesh.sp_group)
    return received
