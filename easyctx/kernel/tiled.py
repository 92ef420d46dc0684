"""Attention in plain PyTorch, tile by tile: any device, dtype and mask, in memory that does not grow with length.

For what the fused kernels lack (a window on a CPU, a softcap there, float32 on a GPU, wide heads); slower than they
are. Tiles that a band hides whole are skipped. Half precision is computed in float32.
"""

from collections.abc import Iterator

import torch

from easyctx.band import Band, Block, band_block
from easyctx.kernel.base import Kernel, Workload
from easyctx.kernel.values import Gradients, Saved, Score, exact_dtype

TILE_ELEMENTS = 1 << 24  # scores held at a time, over batch and heads: 64 MiB in float32
LARGEST_TILE, SMALLEST_TILE = 1024, 16  # tokens on a side


class Tiled(Kernel):
    """The online softmax of FlashAttention (arXiv 2205.14135), in matrix products of whole tiles."""

    name = "tiled"

    def refuses(self, work: Workload) -> str | None:
        return None

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = exact_dtype(q_BSHD.dtype)
        groups = k_BSKD.shape[2]
        out = torch.empty_like(q_BSHD, dtype=exact, memory_format=torch.contiguous_format)
        lse_BHS = q_BSHD.new_empty((q_BSHD.shape[0], q_BSHD.shape[2], q_BSHD.shape[1]), dtype=exact)
        for rows, tiles in _tiles(q_BSHD, k_BSKD, band):
            q = _grouped(q_BSHD[:, rows], groups, exact)
            largest = q.new_full((*q.shape[:-1], 1), float("-inf"))
            total, weighted = torch.zeros_like(largest), torch.zeros_like(q)
            for tile in tiles:
                k, v = (_keys(t[:, tile.k], exact) for t in (k_BSKD, v_BSKD))
                inside = slice(tile.q.start - rows.start, tile.q.stop - rows.start)
                scores, _ = _scores(q[..., inside, :], k, tile.band, score)
                higher = torch.maximum(largest[..., inside, :], scores.amax(-1, keepdim=True))
                shrink = (largest[..., inside, :] - higher).exp()
                p = (scores - higher).exp_()
                total[..., inside, :] = total[..., inside, :] * shrink + p.sum(-1, keepdim=True)
                weighted[..., inside, :] = weighted[..., inside, :] * shrink + p @ v
                largest[..., inside, :] = higher
            out[:, rows] = _ungrouped(weighted / total)
            lse_BHS[:, :, rows] = (largest + total.log()).squeeze(-1).flatten(1, 2)
        return out, lse_BHS

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS = saved
        exact, groups = lse_BHS.dtype, k_BSKD.shape[2]
        dq = torch.zeros_like(q_BSHD, dtype=exact, memory_format=torch.contiguous_format)
        dk = torch.zeros_like(k_BSKD, dtype=exact, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(dk)
        for _, tiles in _tiles(q_BSHD, k_BSKD, band):
            for tile in tiles:
                q, out, dout = (_grouped(t[:, tile.q], groups, exact) for t in (q_BSHD, out_BSHD, dout_BSHD))
                k, v = (_keys(t[:, tile.k], exact) for t in (k_BSKD, v_BSKD))
                scores, slope = _scores(q, k, tile.band, score)
                p = (scores - lse_BHS[:, :, tile.q].unflatten(1, (groups, -1))[..., None]).exp_()
                dv[:, tile.k] += (p.mT @ dout).sum(2).transpose(1, 2)
                delta = (out * dout).sum(-1, keepdim=True)
                ds = p.mul_(dout @ v.mT - delta)
                ds = ds.mul_(score.scale) if slope is None else ds.mul_(slope * score.scale)
                dq[:, tile.q] += _ungrouped(ds @ k)
                dk[:, tile.k] += (ds.mT @ q).sum(2).transpose(1, 2)
        return dq, dk, dv


def _tiles(q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, band: Band) -> Iterator[tuple[slice, list[Block]]]:
    """(query rows, the tiles of keys that they see) from top to bottom; a tile may cut off rows that see none of it."""
    num_queries, num_keys = q_BSHD.shape[1], k_BSKD.shape[1]
    side = int((TILE_ELEMENTS / (q_BSHD.shape[0] * q_BSHD.shape[2])) ** 0.5)
    side = max(SMALLEST_TILE, min(LARGEST_TILE, side))
    for top in range(0, num_queries, side):
        rows = slice(top, min(top + side, num_queries))
        tiles = []
        for left in range(0, num_keys, side):
            by = top - left  # the band, counted from this tile's corner
            inner = Band(*(None if edge is None else edge + by for edge in (band.low, band.high)))
            tile = band_block(rows.stop - top, min(side, num_keys - left), inner)
            if tile is not None:
                tiles.append(tile.shifted(top, left))
        yield rows, tiles


def _grouped(x_BSHD: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, S, H, D] -> [B, K, H/K, S, D]: query heads beside the key head that they share."""
    return x_BSHD.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _keys(x_BSKD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, S, K, D] -> [B, K, 1, S, D]."""
    return x_BSKD.to(dtype).transpose(1, 2).unsqueeze(2)


def _scores(q: torch.Tensor, k: torch.Tensor, band: Band, score: Score) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked scores `[B, K, H/K, Sq, Sk]`, and with a softcap their derivative by the scores before it."""
    scores, slope = (q @ k.mT).mul_(score.scale), None
    if score.softcap is not None:
        capped = torch.tanh(scores / score.softcap)
        scores, slope = capped * score.softcap, 1 - capped.square()
    if not band.is_full:
        scores.masked_fill_(~band.allowed(q.shape[-2], k.shape[-2], q.device), float("-inf"))
    return scores, slope
