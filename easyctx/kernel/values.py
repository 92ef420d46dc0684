"""The values that kernels and schedules hand to each other.

Shapes: B batch, S tokens, H query heads, K key/value heads (H is a multiple of K), D head dim. Tensors are
`[B, S, H, D]`; log-sum-exps are `[B, H, S]`, natural logarithm, float32 (float64 for float64 input).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Score:
    """How a query and a key make a score: scale * q·k, and with a softcap c then c * tanh(score / c)."""

    scale: float
    softcap: float | None = None


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # dq, dk, dv


class Saved(NamedTuple):
    """What a backward needs of its forward. `out` and `lse` are the global ones, merged over all blocks."""

    q_BSHD: torch.Tensor
    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor
    out_BSHD: torch.Tensor
    lse_BHS: torch.Tensor

    def of_block(self, rows: slice, queries: slice, keys: slice) -> "Saved":
        """The part that a block of these rows of the batch, query and key indices is about."""
        q, k, v, out, lse = self
        return Saved(q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries], lse[rows, :, queries])


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which log-sum-exps and sums over blocks are kept: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32
