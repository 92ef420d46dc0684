"""Merging partial attention outputs by their log-sum-exps, in float32 (float64 for float64 input)."""

import torch

from easyctx.kernel import exact_dtype


class Accumulator:
    """The running attention output over the keys seen so far.

    Each partial (out, lse) over a set of keys is folded in exactly: with lse' = log(e^lse + e^new), the outputs are
    averaged with the weights e^(lse - lse') and e^(new - lse'). Everything is kept in float32 until `result`, so
    that the error does not grow with the number of partials.
    """

    def __init__(self, q_BSHD: torch.Tensor) -> None:
        batch, length, heads, _ = q_BSHD.shape
        self.dtype = q_BSHD.dtype
        exact = exact_dtype(self.dtype)
        self.out_BSHD = torch.zeros_like(q_BSHD, dtype=exact, memory_format=torch.contiguous_format)
        self.lse_BHS = torch.full((batch, heads, length), float("-inf"), dtype=exact, device=q_BSHD.device)

    def add(self, rows: slice, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor) -> None:
        """Fold in a partial over the queries `rows`; its lse is finite in every row (see `Block`)."""
        old_out, old_lse = self.out_BSHD[:, rows], self.lse_BHS[:, :, rows]
        new_lse = torch.logaddexp(old_lse, lse_BHS)
        keep = (old_lse - new_lse).exp().transpose(1, 2).unsqueeze(-1)
        take = (lse_BHS - new_lse).exp().transpose(1, 2).unsqueeze(-1)
        old_out.mul_(keep).addcmul_(out_BSHD.to(old_out.dtype), take)
        old_lse.copy_(new_lse)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD` in the dtype of q and `lse_BHS`."""
        return self.out_BSHD.to(self.dtype), self.lse_BHS
