"""A running output that lives inside flash-attn-4's kernel."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from easyctx.band import Block
from easyctx.kernel.hopper import forward as hopper_forward
from easyctx.kernel.hopper.arguments import mask_arguments, with_unit_stride
from easyctx.kernel.merge import weights_of
from easyctx.kernel.running import RunningOutput
from easyctx.kernel.torch_cuda import packed_arguments
from easyctx.kernel.values import Score

if TYPE_CHECKING:
    from easyctx.kernel.flash4 import Flash4


class HopperOutput(RunningOutput):
    """out and rest, which the kernel itself folds every block into (`forward.py`)."""

    def __init__(self, kernel: "Flash4", q_BSHD: torch.Tensor, score: Score, *, unrounded: bool) -> None:
        self.q, self.score, self.unrounded = with_unit_stride(q_BSHD), score, unrounded
        batch, length, heads, _ = q_BSHD.shape
        self.out = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        self.rest: torch.Tensor | None = None
        self.lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q_BSHD.device)
        self.seen = _Seen(length)

    def add(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, block: Block, *, is_last: bool = False) -> None:
        rows = range(self.q.shape[0])[block.rows]
        if block.cuts and len(rows) > 1:  # the library takes one packed row at a time
            for row in rows:
                self.add(k_BSKD, v_BSKD, replace(block, row=row), is_last=is_last)
            return
        is_first = self._begin(block)
        keeps_rest = self.unrounded or not is_last
        if self.rest is None and (keeps_rest or not is_first):
            self.rest = torch.empty_like(self.out)
        q, out = (t[block.rows, block.q] for t in (self.q, self.out))
        k, v = (with_unit_stride(t)[block.rows, block.k] for t in (k_BSKD, v_BSKD))
        rest = None if self.rest is None else self.rest[block.rows, block.q]
        lse = self.lse[block.rows, :, block.q]
        cu_seqlens, num_queries, num_keys = None, q.shape[1], k.shape[1]
        if block.cuts:
            cu_seqlens, num_queries = packed_arguments(block.cuts, q.device)
            num_keys = num_queries
            q, k, v, out, lse = (t[0] for t in (q, k, v, out, lse))
            rest = None if rest is None else rest[0]
        mask = mask_arguments(block.band, num_queries, num_keys)
        hopper_forward.attend(
            q, k, v, out, rest, lse, scale=self.score.scale, softcap=self.score.softcap, cu_seqlens=cu_seqlens,
            is_first=is_first, keeps_rest=keeps_rest, **mask,
        )  # fmt: skip

    def _begin(self, block: Block) -> bool:
        """Whether nothing came yet for any query of the block; if it did for some, all get something to add to."""
        if block.row is None and self.seen.none(block.q):
            self.seen.add(block.q)
            return True
        for part in self.seen.missing(block.q):
            self._nothing(part)
        self.seen.add(block.q)
        return False

    def _nothing(self, queries: slice) -> None:
        """The output over no keys: 0, with a log-sum-exp of -inf."""
        if self.rest is None:
            self.rest = torch.empty_like(self.out)
        self.out[:, queries].zero_()
        self.rest[:, queries].zero_()
        self.lse[:, :, queries].fill_(float("-inf"))

    def merge(self, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, queries: slice) -> None:
        for part in self.seen.missing(queries):
            self._nothing(part)
        assert self.rest is not None
        out, rest, lse = self.out[:, queries], self.rest[:, queries], self.lse[:, :, queries]
        keep, take, total = weights_of(lse, lse_BHS)
        merged = (out.float() + rest) * keep + out_BSHD * take
        out.copy_(merged)
        rest.copy_(merged - out)
        lse.copy_(total)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        for part in self.seen.missing(slice(0, self.q.shape[1])):
            self._nothing(part)
        if self.unrounded and self.rest is not None:
            return self.out.float() + self.rest, self.lse
        return self.out, self.lse


class _Seen:
    """Which queries have seen a key so far: ascending stretches that do not touch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.stretches: list[slice] = []

    def none(self, queries: slice) -> bool:
        return all(s.stop <= queries.start or queries.stop <= s.start for s in self.stretches)

    def missing(self, queries: slice) -> list[slice]:
        """The parts of `queries` that have seen nothing."""
        parts, start = [], queries.start
        for s in self.stretches:
            if start < s.start < queries.stop:
                parts.append(slice(start, s.start))
            start = max(start, s.stop)
        if start < queries.stop:
            parts.append(slice(start, queries.stop))
        return parts

    def add(self, queries: slice) -> None:
        merged: list[slice] = []
        for s in sorted([*self.stretches, queries], key=lambda s: s.start):
            if merged and s.start <= merged[-1].stop:
                merged[-1] = slice(merged[-1].start, max(merged[-1].stop, s.stop))
            else:
                merged.append(s)
        self.stretches = merged
