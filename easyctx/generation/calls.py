"""One call of the model: which tokens it is given, and what each of them attends to.

A call has up to two kinds of tokens, laid behind each other in one sequence of batch 1 (their positions say where
they are): a *body*, sharded over the ranks as the mode's layout has it, and *branches*, short stretches that every
rank computes alike. The body attends to itself by the mode's schedule and to the keys kept of earlier calls; a branch
to the first `sees` sharded positions, and to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch

from easyctx.attention import add_sinks
from easyctx.band import CAUSAL, FULL, Band, Block, band_block
from easyctx.generation.prefix import (
    KeptAttention,
    Keys,
    attend,
    attend_sharded,
    gather_queries,
    merge_for_all,
    merge_for_owners,
)
from easyctx.generation.store import KeyStore
from easyctx.generation.tails import Step, Tail
from easyctx.kernel import Score, Workload, get_kernel
from easyctx.kernel.merge import Accumulator
from easyctx.layout import Layout, Run
from easyctx.mask import Mask
from easyctx.mesh import Mesh
from easyctx.modes import Mode


@dataclass(frozen=True)
class Ranks:
    """The mode and the ranks that share a sequence."""

    mode: Mode  # with a schedule
    mesh: Mesh
    kernel: str = "auto"  # which on a GPU gives a few queries to a kernel that shares out keys

    @property
    def size(self) -> int:
        return self.mesh.sp_size

    @cached_property
    def layout(self) -> Layout:
        return self.mode.shard_layout(self.size, self.mesh.ring_degree)

    @property
    def multiple(self) -> int:
        """Sharded lengths are multiples of this."""
        return self.layout.multiple(self.size)

    def runs(self, start: int, length: int, rank: int | None = None) -> tuple[Run, ...]:
        """Positions of a rank (default: this one) in a body at positions `start` to `start + length`."""
        runs = self.layout.runs(length, self.size, self.mesh.sp_rank if rank is None else rank)
        return tuple(Run(start + run.start, run.count, run.step) for run in runs)

    def attention(self, q_BSHD: torch.Tensor, score: Score, window: int | None) -> KeptAttention:
        work = Workload(q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1], window is not None, score.softcap is not None)
        ring, ulysses = self.mode.axes(self.mesh)
        kernel = get_kernel(self.kernel, work)
        # Unrounded, since it is merged with what other keys give.
        forced = self.kernel != "auto"
        return KeptAttention(
            self.mode.layout, kernel, score, Mask(window), ring, ulysses, unrounded=True, forced=forced
        )


@dataclass
class Branch:
    """Tokens of a call that every rank computes alike: `ids` follow what the tail holds already."""

    ids: Sequence[int]
    sees: int  # it attends to the sharded positions before this one
    tail: Tail

    @property
    def positions(self) -> Run:
        return Run(self.tail.start + self.tail.length, len(self.ids))

    @property
    def joins(self) -> object:
        """What branches have in common that are computed as one step."""
        return self.tail.memory if len(self.ids) == 1 else self


@dataclass
class Call:
    """Everything that one call of the model attends to; the model's attention layers find it as a keyword.

    Args:
        store: keys kept of earlier calls; the body's are added with `keep`.
        body_ids: the body's tokens (all of them, on every rank), a multiple of `ranks.multiple`.
        start: the position of the body's first token. Of the store it sees the positions before.
    """

    ranks: Ranks
    store: KeyStore
    start: int = 0
    body_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    branches: Sequence[Branch] = ()
    keep: bool = False

    @property
    def body(self) -> int:
        """Body tokens on this rank."""
        return len(self.body_ids) // self.ranks.size

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        return self.ranks.runs(self.start, len(self.body_ids)) if self.body else ()

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids and position_ids `[1, n]` of this rank's call."""
        runs = [*self.runs, *(branch.positions for branch in self.branches)]
        positions = torch.cat([torch.arange(run.count) * run.step + run.start for run in runs])
        ids = [torch.tensor(branch.ids, dtype=torch.int64) for branch in self.branches]
        if self.body:
            mesh = self.ranks.mesh
            ids = [self.ranks.layout.shard(self.body_ids, mesh.sp_size, mesh.sp_rank, dim=0), *ids]
        return {"input_ids": torch.cat(ids)[None].to(device), "position_ids": positions[None].to(device)}

    def branch_slices(self) -> list[slice]:
        """Where each branch lies in the call's sequence."""
        slices, first = [], self.body
        for branch in self.branches:
            slices.append(slice(first, first + len(branch.ids)))
            first += len(branch.ids)
        return slices

    def finish(self) -> None:
        """After the model ran: what it put away is now what earlier calls left."""
        if self.keep:
            self.store.extend(self.runs)
        for branch in self.branches:
            branch.tail.length += len(branch.ids) if branch.tail.capacity else 0

    def attend(
        self,
        layer: int,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        score: Score,
        window: int | None,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """A layer's attention: q `[1, n, H, D]`, k and v `[1, n, K, D]` of the call's tokens -> out, like q."""
        how, cut = self.ranks.attention(q_BSHD, score, window), self.body
        # Of keys at and after its start the body brings its own.
        stop = self.start if cut else max(branch.sees for branch in self.branches)
        earliest = min([*([self.start] if cut else []), *(branch.positions.start for branch in self.branches)])
        first = 0 if window is None else max(earliest - window + 1, 0)
        kept = self.store.keys(layer, min(first, stop), stop, q_BSHD.device)
        parts = []
        if cut:
            parts.append(self._attend_body(q_BSHD[:, :cut], k_BSKD[:, :cut], v_BSKD[:, :cut], kept, how))
        if self.branches:
            own = [Keys(k_BSKD[:, :cut], v_BSKD[:, :cut], self.runs)] if cut else []
            rest = (q_BSHD[:, cut:], k_BSKD[:, cut:], v_BSKD[:, cut:])
            parts.append(self._attend_branches(layer, *rest, [*kept, *own], how))
        if self.keep:
            self.store.put(layer, k_BSKD[:, :cut], v_BSKD[:, :cut])
        merged = [add_sinks(out, lse, sinks_H)[0] if sinks_H is not None else out for out, lse in parts]
        outs = [out.to(q_BSHD.dtype) for out in merged]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _attend_body(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: list[Keys], how: KeptAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.ranks.mode.schedule is not None
        total = Accumulator(q)
        total.add(*self.ranks.mode.schedule.forward(q, k, v, how))
        if self.start:
            axis, queries, first = self.ranks.mesh.sp, [], 0
            for rank in range(axis.size):
                for run in self.ranks.runs(self.start, len(self.body_ids), rank):
                    queries.append((slice(first, first + run.count), run, self.start))
                    first += run.count
            out, lse = attend_sharded(gather_queries(axis, q), queries, kept, how)
            if how.mask.window is None:  # one kernel's, or on a rank without keys zeros in float32
                out = out.to(q.dtype)
            total.add(*merge_for_owners(axis, out, lse))
        return total.result()

    def _attend_branches(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sharded: list[Keys], how: KeptAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, queries = Accumulator(q), []
        for branch, where in zip(self.branches, self._slices_behind_body, strict=True):
            queries.append((where, branch.positions, branch.sees))
        for where, group in self._groups:
            if isinstance(group, Step):
                total.add(*group.attend(layer, q[:, where], k[:, where], v[:, where], how), where)
                continue
            keys, values = group.tail.with_new(layer, k[:, where], v[:, where])
            blocks = tail_blocks(group.tail.length, len(group.ids), how.mask.window)
            attend(total, q, keys, values, [block.shifted(where.start, 0) for block in blocks], how)
        if any(branch.sees for branch in self.branches):
            total.add(*merge_for_all(self.ranks.mesh.sp, *attend_sharded(q, queries, sharded, how)))
        return total.result()

    @cached_property
    def _slices_behind_body(self) -> list[slice]:
        return [slice(where.start - self.body, where.stop - self.body) for where in self.branch_slices()]

    @cached_property
    def _groups(self) -> list[tuple[slice, Branch | Step]]:
        """Where they lie behind the body, and neighbours that are one step; any other branch alone."""
        groups: list[tuple[slice, Branch | Step]] = []
        placed = zip(self._slices_behind_body, self.branches, strict=True)
        for _, neighbours in groupby(placed, key=lambda pair: id(pair[1].joins)):
            slices, branches = zip(*neighbours, strict=True)
            group = Step([branch.tail for branch in branches]) if len(branches) > 1 else branches[0]
            groups.append((slice(slices[0].start, slices[-1].stop), group))
        return groups


def tail_blocks(old: int, new: int, window: int | None) -> list[Block]:
    """The blocks of `new` queries that follow `old` ones, over the keys of both."""
    if window is not None:
        block = band_block(new, old + new, Band(old - window + 1, old))
        return [block] if block is not None else []
    blocks = [Block(slice(0, new), slice(0, old), FULL)] if old and new > 1 else []
    first = old if new > 1 else 0
    return [*blocks, Block(slice(0, new), slice(first, old + new), CAUSAL if new > 1 else FULL)]
