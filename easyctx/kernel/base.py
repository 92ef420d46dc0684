"""What a kernel is: exact attention over one block on one device.

Shapes and dtypes as in `values.py`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from easyctx.band import Band, Block
from easyctx.kernel.running import RunningGradients, RunningOutput
from easyctx.kernel.values import Gradients, Saved, Score


@dataclass(frozen=True)
class Workload:
    """What the chooser must know of the attention ahead: where it runs, on what, under which masks."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    windowed: bool = False
    softcapped: bool = False
    packed: bool = False


class Kernel:
    """One library's attention. All of its quirks stay inside its class."""

    name: str
    key_tile: int = 1  # blocks do best when the keys that come with them begin at a multiple of this

    def refuses(self, work: Workload) -> str | None:
        """Why this kernel cannot do `work` here (a missing package, a device, a dtype, a mask), or None."""
        raise NotImplementedError

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD` and `lse_BHS`, for softmax(scores + mask) v over this block.

        out in the dtype of q, or unrounded in float32 where the library gives it so.
        """
        raise NotImplementedError

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        """This block's share of dq, dk and dv, given the block's rows of the global out and lse.

        In the dtype of q, or in float32 where the library can be had to give its sums unrounded.
        """
        raise NotImplementedError

    def output(self, q_BSHD: torch.Tensor, score: Score, *, unrounded: bool = False) -> RunningOutput:
        """The attention of these queries, over nothing yet.

        unrounded: the result is wanted in the exact dtype, where the kernel has a choice.
        """
        return RunningOutput(self, q_BSHD, score)

    def gradients(
        self, dout_BSHD: torch.Tensor, saved: Saved, score: Score, *, unrounded: bool = False
    ) -> RunningGradients:
        """The gradients of the queries in `saved`, whose out and lse are the global ones, over nothing yet.

        unrounded: they are wanted in the exact dtype, where the kernel has a choice.
        """
        return RunningGradients(self, dout_BSHD, saved, score)

    def forward_block(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, block: Block, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` or `forward_packed`, as the block asks."""
        if block.cuts:
            return self.forward_packed(q_BSHD, k_BSKD, v_BSKD, block.cuts, block.band, score)
        return self.forward(q_BSHD, k_BSKD, v_BSKD, block.band, score)

    def backward_block(self, dout_BSHD: torch.Tensor, saved: Saved, block: Block, score: Score) -> Gradients:
        """`backward` or `backward_packed`, as the block asks."""
        if block.cuts:
            return self.backward_packed(dout_BSHD, saved, block.cuts, block.band, score)
        return self.backward(dout_BSHD, saved, block.band, score)

    def forward_packed(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        cuts: tuple[int, ...],
        band: Band,
        score: Score,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` where the block is a chain of squares with borders at `cuts` (see `Block`).

        Square by square; a library with cu_seqlens does better.
        """
        parts = [self.forward(q_BSHD[:, s], k_BSKD[:, s], v_BSKD[:, s], band, score) for s in squares(cuts)]
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)

    def backward_packed(
        self, dout_BSHD: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score
    ) -> Gradients:
        """`backward` of `forward_packed`."""
        parts = [self.backward(dout_BSHD[:, s], saved.of_block(slice(None), s, s), band, score) for s in squares(cuts)]
        dq, dk, dv = (torch.cat(gradients, dim=1) for gradients in zip(*parts, strict=True))
        return dq, dk, dv


class VarlenKernel(Kernel):
    """A library that takes a chain of squares in one call, as tokens without a batch dim and cu_seqlens."""

    def forward_flat(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: tuple[int, ...], band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward_packed` of one row: q `[S, H, D]`, k and v `[S, K, D]` -> out `[S, H, D]`, lse `[H, S]`."""
        raise NotImplementedError

    def backward_flat(
        self, dout: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score
    ) -> Gradients:
        """`backward_packed` of one row, all of whose tensors lack the batch dim."""
        raise NotImplementedError

    def forward_packed(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        cuts: tuple[int, ...],
        band: Band,
        score: Score,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if q_BSHD.shape[0] > 1:
            return super().forward_packed(q_BSHD, k_BSKD, v_BSKD, cuts, band, score)
        out, lse = self.forward_flat(q_BSHD[0], k_BSKD[0], v_BSKD[0], cuts, band, score)
        return out.unsqueeze(0), lse.unsqueeze(0)

    def backward_packed(
        self, dout_BSHD: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score
    ) -> Gradients:
        if dout_BSHD.shape[0] > 1:
            return super().backward_packed(dout_BSHD, saved, cuts, band, score)
        dq, dk, dv = self.backward_flat(dout_BSHD[0], Saved(*(t[0] for t in saved)), cuts, band, score)
        return dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)


def squares(cuts: tuple[int, ...]) -> Iterator[slice]:
    """The stretches between cuts."""
    return (slice(a, b) for a, b in itertools.pairwise(cuts))


def transpose(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, S, H, D] <-> [B, H, S, D], as views."""
    return tuple(t.transpose(1, 2) for t in tensors)
