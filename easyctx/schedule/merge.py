"""Merging partial attention outputs by their log-sum-exps, in float32 (float64 for float64 input)."""

import torch

from easyctx.kernel import exact_dtype

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
        """Fold in a partial over these queries and rows of the batch.

        Its lse is finite in every row of which nothing came yet (see `Block`).
        """
        if self.out_BSHD is None and out_BSHD.shape == self.like.shape:
            self.out_BSHD, self.lse_BHS = out_BSHD, lse_BHS
            return
        out, lse = self._sums()
        old_out, old_lse = out[rows, queries], lse[rows, :, queries]
        new_lse = torch.logaddexp(old_lse, lse_BHS)
        keep = (old_lse - new_lse).exp().transpose(1, 2).unsqueeze(-1)
        take = (lse_BHS - new_lse).exp().transpose(1, 2).unsqueeze(-1)
        old_out.mul_(keep).addcmul_(out_BSHD.to(old_out.dtype), take)
        old_lse.copy_(new_lse)

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        exact = exact_dtype(self.like.dtype)
        if self.out_BSHD is None or self.lse_BHS is None:
            batch, length, heads, _ = self.like.shape
            self.out_BSHD = torch.zeros_like(self.like, dtype=exact, memory_format=torch.contiguous_format)
            self.lse_BHS = self.like.new_full((batch, heads, length), float("-inf"), dtype=exact)
        self.out_BSHD = self.out_BSHD.to(exact)
        return self.out_BSHD, self.lse_BHS

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD`, in float32 unless it is a half-precision kernel's only partial, and `lse_BHS`."""
        assert self.out_BSHD is not None
        assert self.lse_BHS is not None
        return self.out_BSHD, self.lse_BHS
