"""The oracle: attention written out in float64. Slow, O(S^2) memory, and what every other kernel is tested against."""

import torch

from easyctx.band import Band
from easyctx.kernel.base import Kernel, Workload
from easyctx.kernel.values import Gradients, Saved, Score, exact_dtype


class Reference(Kernel):
    """Plain matrix products in float64 on any device, for any band and softcap."""

    name = "reference"

    def refuses(self, work: Workload) -> str | None:
        return None

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores, _ = _scores(q_BSHD, k_BSKD, band, score)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp()
        out = torch.einsum("bkgqs,bskd->bqkgd", probabilities, v_BSKD.double())
        return out.reshape(q_BSHD.shape).to(q_BSHD.dtype), lse.flatten(1, 2).to(exact_dtype(q_BSHD.dtype))

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS = saved
        groups = k_BSKD.shape[2]
        q, out, dout = (_grouped(t, groups) for t in (q_BSHD, out_BSHD, dout_BSHD))
        lse = lse_BHS.double().unflatten(1, (groups, -1))
        scores, slope = _scores(q_BSHD, k_BSKD, band, score)
        p = (scores - lse[..., None]).exp()
        dv = torch.einsum("bkgqs,bqkgd->bskd", p, dout)
        dp = torch.einsum("bqkgd,bskd->bkgqs", dout, v_BSKD.double())
        delta = torch.einsum("bqkgd,bqkgd->bkgq", out, dout)
        ds = p * (dp - delta[..., None]) * slope * score.scale
        dq = torch.einsum("bkgqs,bskd->bqkgd", ds, k_BSKD.double())
        dk = torch.einsum("bkgqs,bqkgd->bskd", ds, q)
        return dq.reshape(q_BSHD.shape).to(q_BSHD.dtype), dk.to(k_BSKD.dtype), dv.to(v_BSKD.dtype)


def _grouped(x_BSHD: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, S, K, H/K, D] in float64: query heads beside the key head that they share."""
    return x_BSHD.double().unflatten(2, (groups, -1))


def _scores(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, band: Band, score: Score
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Masked scores, float64 [B, K, H/K, Sq, Sk], and their derivative by the scores before the softcap."""
    q = _grouped(q_BSHD, k_BSKD.shape[2])
    slope: torch.Tensor | float = 1.0
    scores = torch.einsum("bqkgd,bskd->bkgqs", q, k_BSKD.double()) * score.scale
    if score.softcap is not None:
        capped = torch.tanh(scores / score.softcap)
        scores, slope = capped * score.softcap, 1 - capped**2
    if not band.is_full:
        scores = scores.masked_fill(~band.allowed(q.shape[1], k_BSKD.shape[1], q.device), float("-inf"))
    return scores, slope
