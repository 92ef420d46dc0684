"""What a kernel is: exact attention over one block on one device.

Shapes, everywhere in this folder: B batch, S tokens, H query heads, K key/value heads (H is a multiple of K), D head
dim. Tensors are `[B, S, H, D]`; log-sum-exps are `[B, H, S]`, natural logarithm, float32 (float64 for float64 input).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from easyctx.band import Band


@dataclass(frozen=True)
class Workload:
    """What the chooser must know of the attention ahead: where it runs, on what, under which masks."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    windowed: bool = False


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # dq, dk, dv


class Saved(NamedTuple):
    """What a backward needs of its forward. `out` and `lse` are the global ones, merged over all blocks."""

    q_BSHD: torch.Tensor
    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor
    out_BSHD: torch.Tensor
    lse_BHS: torch.Tensor

    def of_block(self, queries: slice, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor) -> "Saved":
        """The rows of `queries` with a block's keys and values."""
        q_BSHD, out_BSHD, lse_BHS = self.q_BSHD[:, queries], self.out_BSHD[:, queries], self.lse_BHS[:, :, queries]
        return Saved(q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS)


class Kernel:
    """One library's attention. All of its quirks stay inside its class."""

    name: str

    def refuses(self, work: Workload) -> str | None:
        """Why this kernel cannot do `work` here (a missing package, a device, a dtype, a mask), or None."""
        raise NotImplementedError

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD` in the dtype of q and `lse_BHS`, for softmax(scale * q k^T + mask) v over this block."""
        raise NotImplementedError

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, scale: float) -> Gradients:
        """This block's share of dq, dk and dv, given the block's rows of the global out and lse.

        In the dtype of q, or in float32 where the library can be had to give its sums unrounded.
        """
        raise NotImplementedError


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which log-sum-exps and sums over blocks are kept: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transpose(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, S, H, D] <-> [B, H, S, D], as views."""
    return tuple(t.transpose(1, 2) for t in tensors)
