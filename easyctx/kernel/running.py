"""Attention of some queries over one block of keys after another, and its gradients: what schedules work with.

These are the ways of a kernel that knows single blocks only: its partial results are merged and summed outside of it,
in the exact dtype. A kernel that can keep the sums itself has its own classes (in `hopper/`).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from easyctx.band import Block
from easyctx.kernel.merge import Accumulator
from easyctx.kernel.values import Saved, Score, exact_dtype

if TYPE_CHECKING:
    from easyctx.kernel.base import Kernel


class RunningOutput:
    """The output of some queries over the keys seen so far.

    A kernel that keeps it in half precision gives it unrounded where `unrounded` asks for that.
    """

    def __init__(self, kernel: "Kernel", q_BSHD: torch.Tensor, score: Score) -> None:
        self.kernel, self.q_BSHD, self.score = kernel, q_BSHD, score
        self.total = Accumulator(q_BSHD)

    def add(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, block: Block, *, is_last: bool = False) -> None:
        """Fold in a block of these queries and the given keys. is_last: no other one will follow."""
        q, k, v = self.q_BSHD[block.rows, block.q], k_BSKD[block.rows, block.k], v_BSKD[block.rows, block.k]
        self.total.add(*self.kernel.forward_block(q, k, v, block, self.score), block.q, block.rows)

    def merge(self, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, queries: slice) -> None:
        """Fold in what another rank computed for these queries; its lse may be -inf."""
        self.total.add(out_BSHD, lse_BHS, queries)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD` and `lse_BHS`; out may be unrounded. The lse is -inf, and out 0, of a query that saw no key."""
        return self.total.result()


class KeyGradients:
    """dk and dv of some keys, summed over blocks and ranks.

    Sums travel as they are held (`message`), in the exact dtype, so that the error does not grow with the ring. How
    they are held follows from the blocks that they are sums of, which both sides of a message know.
    """

    def __init__(self, k_BSKD: torch.Tensor, dtype: torch.dtype) -> None:
        self.sums = torch.zeros((2, *k_BSKD.shape), dtype=dtype, device=k_BSKD.device)

    @property
    def message(self) -> torch.Tensor:
        return self.sums

    def new_message(self, keys: slice, blocks: Iterable[Block]) -> torch.Tensor:
        """Memory for the message of another rank that computed these blocks of these keys of ours."""
        return torch.empty_like(self.sums[:, :, keys], memory_format=torch.contiguous_format)

    def add_message(self, message: torch.Tensor, keys: slice, blocks: Iterable[Block]) -> None:
        """Add what came in."""
        self.sums[:, :, keys] += message

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv `[B, S, K, D]`, which may be unrounded, and parts of one buffer."""
        return self.sums[0], self.sums[1]


class RunningGradients:
    """dq of some queries, summed over the keys seen so far; the keys' gradients are summed beside.

    saved: what the backward needs of the forward, for these queries; its keys and values are not used.
    """

    def __init__(self, kernel: "Kernel", dout_BSHD: torch.Tensor, saved: Saved, score: Score) -> None:
        self.kernel, self.dout_BSHD, self.saved, self.score = kernel, dout_BSHD, saved, score
        self.dq_BSHD = torch.zeros(saved.q_BSHD.shape, dtype=exact_dtype(dout_BSHD.dtype), device=dout_BSHD.device)

    def new_keys(self, k_BSKD: torch.Tensor, blocks: Iterable[Block]) -> KeyGradients:
        """Sums, all zero, for the gradients of keys of which these blocks are to be computed."""
        return KeyGradients(k_BSKD, self.dq_BSHD.dtype)

    def add(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, block: Block, of_keys: KeyGradients) -> None:
        """Add the gradients of a block to dq and to `of_keys`, which are those of all the given keys."""
        part = self.saved._replace(k_BSKD=k_BSKD, v_BSKD=v_BSKD).of_block(block.rows, block.q, block.k)
        dq, dk, dv = self.kernel.backward_block(self.dout_BSHD[block.rows, block.q], part, block, self.score)
        self.dq_BSHD[block.rows, block.q] += dq
        of_keys.sums[0][block.rows, block.k] += dk
        of_keys.sums[1][block.rows, block.k] += dv

    def like(self, queries: slice) -> torch.Tensor:
        """Memory for unrounded dq of these queries."""
        return torch.empty_like(self.dq_BSHD[:, queries], memory_format=torch.contiguous_format)

    def add_dq(self, dq_BSHD: torch.Tensor, queries: slice) -> None:
        """Add what another rank computed for these queries."""
        self.dq_BSHD[:, queries] += dq_BSHD

    def dq(self, *, unrounded: bool = False) -> torch.Tensor:
        """`[B, S, H, D]`, in the exact dtype if that is asked for."""
        return self.dq_BSHD
