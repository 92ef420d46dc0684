"""Merging partial attention outputs by their log-sum-exps, in float32 (float64 for float64 input)."""

import torch

from easyctx.kernel.values import exact_dtype

EVERYTHING = slice(None)


class Accumulator:
    """The running attention output over the keys seen so far.

    Each partial (out, lse) over a set of keys is folded in exactly: with lse' = log(e^lse + e^new), the outputs are
    averaged with the weights e^(lse - lse') and e^(new - lse'). Sums are kept in float32, so that the error does
    not grow with the number of partials; a partial that is the only one stays as the kernel made it.
    """

    def __init__(self, q_BSHD: torch.Tensor) -> None:
        self.like = q_BSHD
        self.out_BSHD: torch.Tensor | None = None
        self.lse_BHS: torch.Tensor | None = None

    def add(
        self, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, queries: slice = EVERYTHING, rows: slice = EVERYTHING
    ) -> None:
        """Fold in a partial over these queries and rows of the batch; its lse may be -inf where it saw no key."""
        if self.out_BSHD is None and out_BSHD.shape == self.like.shape:
            self.out_BSHD, self.lse_BHS = out_BSHD, lse_BHS
            return
        out, lse = self._sums()
        merge(out[rows, queries], lse[rows, :, queries], out_BSHD, lse_BHS)

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        exact = exact_dtype(self.like.dtype)
        if self.out_BSHD is None or self.lse_BHS is None:
            batch, length, heads, _ = self.like.shape
            self.out_BSHD = torch.zeros_like(self.like, dtype=exact, memory_format=torch.contiguous_format)
            self.lse_BHS = self.like.new_full((batch, heads, length), float("-inf"), dtype=exact)
        self.out_BSHD = self.out_BSHD.to(exact)
        return self.out_BSHD, self.lse_BHS

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD`, in float32 unless it is a half-precision kernel's only partial, and `lse_BHS`.

        Queries that nothing was added for have 0 and -inf.
        """
        if self.out_BSHD is None or self.lse_BHS is None:
            return self._sums()
        return self.out_BSHD, self.lse_BHS


def merge(
    out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, more_out_BSHD: torch.Tensor, more_lse_BHS: torch.Tensor
) -> None:
    """Fold more into out and lse, both in the exact dtype, in place."""
    if out_BSHD.is_cuda and out_BSHD.dtype == torch.float32:
        from easyctx.kernel.merge_cuda import merge_fused

        merge_fused(out_BSHD, lse_BHS, more_out_BSHD, more_lse_BHS)
        return
    keep, take, total = weights_of(lse_BHS, more_lse_BHS)
    out_BSHD.mul_(keep).addcmul_(more_out_BSHD.to(out_BSHD.dtype), take)
    lse_BHS.copy_(total)


def weights_of(lse_BHS: torch.Tensor, more_BHS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much of either output goes into their sum, `[B, S, H, 1]` each, and the sum's log-sum-exp.

    0 and 0 where neither saw a key.
    """
    total = torch.logaddexp(lse_BHS, more_BHS)
    reference = total.masked_fill(total == float("-inf"), 0.0)
    keep, take = ((part - reference).exp().transpose(1, 2).unsqueeze(-1) for part in (lse_BHS, more_BHS))
    return keep, take, total
