"""Running gradients that live inside flash-attn-4's kernels."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from easyctx.band import Band, Block
from easyctx.kernel.hopper import backward as hopper_backward
from easyctx.kernel.hopper.arguments import mask_arguments, with_unit_stride
from easyctx.kernel.hopper.backward import Statistics
from easyctx.kernel.hopper.order import collect
from easyctx.kernel.running import KeyGradients, RunningGradients
from easyctx.kernel.torch_cuda import packed_arguments
from easyctx.kernel.values import Saved, Score

if TYPE_CHECKING:
    from easyctx.kernel.flash4 import Flash4


class HopperKeyGradients(KeyGradients):
    """dk and dv in the kernel's own sums, or row by row where a block cannot be added to those."""

    def __init__(self, k_BSKD: torch.Tensor, blocks: Iterable[Block], scale: float, dtype: torch.dtype) -> None:
        self.like, self.scale, self.dtype = k_BSKD, scale, dtype
        self.tile = hopper_backward.tile_keys(k_BSKD.shape[3])
        self.tiles: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        if all(fits_tiles(block, self.tile) for block in blocks):
            self.tiles = self._tiles(k_BSKD.shape[1]).zero_()
        else:
            self.rows = torch.zeros((2, *k_BSKD.shape), dtype=torch.float32, device=k_BSKD.device)

    def _tiles(self, length: int) -> torch.Tensor:
        batch, _, heads, head_dim = self.like.shape
        size = -(-length // self.tile) * self.tile * head_dim
        return torch.empty((2, batch, heads, size), dtype=torch.float32, device=self.like.device)

    @property
    def message(self) -> torch.Tensor:
        held = self.tiles if self.tiles is not None else self.rows
        assert held is not None
        return held

    def new_message(self, keys: slice, blocks: Iterable[Block]) -> torch.Tensor:
        length = keys.stop - keys.start
        if all(fits_tiles(block, self.tile) for block in blocks):
            return self._tiles(length)
        return torch.empty((2, *self.like[:, keys].shape), dtype=torch.float32, device=self.like.device)

    def add_message(self, message: torch.Tensor, keys: slice, blocks: Iterable[Block]) -> None:
        if all(fits_tiles(block, self.tile) for block in blocks):
            if self.tiles is None:
                self.tiles = self._tiles(self.like.shape[1]).zero_()
            start = keys.start * self.like.shape[3]
            self.tiles[..., start : start + message.shape[-1]] += message
            return
        if self.rows is None:
            self.rows = torch.zeros((2, *self.like.shape), dtype=torch.float32, device=self.like.device)
        self.rows[:, :, keys] += message

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tiles is None:
            assert self.rows is not None
            return self.rows[0], self.rows[1]
        order = hopper_backward.order_of_keys(self.like.shape[3], self.like.device)
        rows = (None, None) if self.rows is None else (self.rows[0], self.rows[1])
        dk, dv = (
            collect([(tiles, order, self.tile)], scale, row, self.like.shape, self.dtype)
            for tiles, scale, row in zip(self.tiles, (self.scale, 1.0), rows, strict=True)
        )
        return dk, dv


def fits_tiles(block: Block, tile: int) -> bool:
    """Whether a block's keys can be made to begin at the border of a tile without anything more being seen."""
    starts_at_border = block.k.start % tile == 0
    begins_with_band = block.band.low is not None and block.band.low >= 0
    return not block.cuts and (starts_at_border or begins_with_band)


class HopperGradients(RunningGradients):
    """dq in the kernel's own sums: one for blocks with a mask and one for those without, whose tiles differ."""

    def __init__(
        self, kernel: "Flash4", dout_BSHD: torch.Tensor, saved: Saved, score: Score, *, unrounded: bool
    ) -> None:
        self.kernel, self.score = kernel, score
        self.dtype = torch.float32 if unrounded else dout_BSHD.dtype
        # Steps of 0, as an expanded gradient has them, are not what the library expects.
        self.dout = with_unit_stride(dout_BSHD) if all(dout_BSHD.stride()) else dout_BSHD.contiguous()
        self.saved = saved._replace(
            q_BSHD=with_unit_stride(saved.q_BSHD),
            out_BSHD=with_unit_stride(saved.out_BSHD),
            lse_BHS=saved.lse_BHS.contiguous(),
        )
        self.length, self.head_dim = saved.q_BSHD.shape[1], saved.q_BSHD.shape[3]
        self.sums: dict[int, torch.Tensor] = {}
        self.rows: torch.Tensor | None = None
        self._statistics: Statistics | None = None
        self._masked: dict[tuple[int, int], Statistics] = {}

    def new_keys(self, k_BSKD: torch.Tensor, blocks: Iterable[Block]) -> HopperKeyGradients:
        return HopperKeyGradients(k_BSKD, blocks, self.score.scale, self.dtype)

    def add(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, block: Block, of_keys: KeyGradients) -> None:
        assert isinstance(of_keys, HopperKeyGradients)
        if of_keys.tiles is None or not fits_tiles(block, of_keys.tile):
            self._add_by_rows(k_BSKD, v_BSKD, block, of_keys)
            return
        tile = hopper_backward.tile_rows(self.head_dim, is_full=block.band.is_full)
        statistics, sums = self._prepared(tile), self._sums(tile)
        q = slice(block.q.start // tile * tile, block.q.stop)
        k = slice(block.k.start // of_keys.tile * of_keys.tile, block.k.stop)
        if q.start != block.q.start or (q.stop % tile and q.stop != self.length):
            statistics = self._only(block.q)
        by = (block.k.start - k.start) - (block.q.start - q.start)
        band = Band(*(None if edge is None else edge + by for edge in (block.band.low, block.band.high)))
        head_dim, rows = self.head_dim, block.rows
        of_q = slice(q.start * head_dim, -(-q.stop // tile) * tile * head_dim)
        of_k = slice(k.start * head_dim, -(-k.stop // of_keys.tile) * of_keys.tile * head_dim)
        hopper_backward.differentiate(
            self.saved.q_BSHD[rows, q],
            with_unit_stride(k_BSKD)[rows, k],
            with_unit_stride(v_BSKD)[rows, k],
            self.dout[rows, q],
            Statistics(*(t[rows, :, q.start :] for t in statistics)),
            sums[rows, :, of_q],
            of_keys.tiles[0][rows, :, of_k],
            of_keys.tiles[1][rows, :, of_k],
            scale=self.score.scale,
            softcap=self.score.softcap,
            is_full=block.band.is_full,
            **mask_arguments(band, q.stop - q.start, k.stop - k.start),
        )

    def _prepared(self, tile: int) -> Statistics:
        """Statistics of all queries; what makes them also clears the first sums."""
        if self._statistics is None:
            self._statistics, self.sums[tile] = hopper_backward.prepare(
                self.saved.out_BSHD, self.dout, self.saved.lse_BHS, tile
            )
        return self._statistics

    def _sums(self, tile: int) -> torch.Tensor:
        if tile not in self.sums:
            self.sums[tile] = hopper_backward.new_sums(self.length, tile, self.dout).zero_()
        return self.sums[tile]

    def _only(self, queries: slice) -> Statistics:
        """Statistics with which the queries of a tile that are not among these have no part in anything."""
        assert self._statistics is not None
        key = (queries.start, queries.stop)
        if key not in self._masked:
            lse = hopper_backward.new_statistic(tuple(self._statistics.lse_log2.shape), self.dout.device)
            lse.fill_(float("inf"))
            lse[:, :, queries] = self._statistics.lse_log2[:, :, queries]
            self._masked[key] = self._statistics._replace(lse_log2=lse)
        return self._masked[key]

    def _add_by_rows(
        self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, block: Block, of_keys: HopperKeyGradients
    ) -> None:
        part = self.saved._replace(k_BSKD=k_BSKD, v_BSKD=v_BSKD).of_block(block.rows, block.q, block.k)
        if of_keys.rows is None:
            of_keys.rows = torch.zeros((2, *k_BSKD.shape), dtype=torch.float32, device=k_BSKD.device)
        dout, dq = self.dout[block.rows, block.q], self._rows()[block.rows, block.q]
        dk, dv = (rows[block.rows, block.k] for rows in of_keys.rows)
        if not block.cuts:
            whole = Saved(*(with_unit_stride(t) for t in part))
            hopper_backward.differentiate_apart(
                whole, dout, dq, dk, dv, scale=self.score.scale, softcap=self.score.softcap,
                is_full=block.band.is_full, **mask_arguments(block.band, whole.q_BSHD.shape[1], whole.k_BSKD.shape[1]),
            )  # fmt: skip
            return
        longest = packed_arguments(block.cuts, dout.device)[1]
        mask = mask_arguments(block.band, longest, longest)
        for row in range(dout.shape[0]):  # the library takes one packed row at a time
            of_row = Saved(*(with_unit_stride(t[row]) for t in part))
            hopper_backward.differentiate_packed(
                of_row, dout[row], dq[row], dk[row], dv[row], block.cuts,
                scale=self.score.scale, softcap=self.score.softcap, **mask,
            )  # fmt: skip

    def _rows(self) -> torch.Tensor:
        if self.rows is None:
            self.rows = torch.zeros(self.dout.shape, dtype=torch.float32, device=self.dout.device)
        return self.rows

    def like(self, queries: slice) -> torch.Tensor:
        return torch.empty(self.dout[:, queries].shape, dtype=torch.float32, device=self.dout.device)

    def add_dq(self, dq_BSHD: torch.Tensor, queries: slice) -> None:
        self._rows()[:, queries] += dq_BSHD

    def dq(self, *, unrounded: bool = False) -> torch.Tensor:
        if not self.sums:
            return self._rows()
        device, dtype = self.dout.device, torch.float32 if unrounded else self.dtype
        sums = [
            (values, hopper_backward.order_of_rows(self.head_dim, tile, device), tile)
            for tile, values in self.sums.items()
        ]
        return collect(sums, self.score.scale, self.rows, self.dout.shape, dtype)
