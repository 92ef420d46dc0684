"""The backward kernel over running sums: blocks add to dq, dk and dv in float32, and one conversion ends it.

The library's backward adds to float32 sums anyway, in an order of its own (tile after tile, as the matrix units hold
them), and rounds them with a kernel of its own. So a block's gradients need no pass of theirs when the sums are not
cleared between blocks. What a block's q and k must then do is begin at the border of a tile.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from flash_attn.cute.interface import _bwd_postprocess_convert, _bwd_preprocess, torch2cute_dtype_map
from flash_attn.cute.utils import AuxData

from easyctx.kernel.hopper import COMPILING, compiled_once
from easyctx.kernel.hopper.backward_kernel import compiled, config_of
from easyctx.kernel.hopper.order import collect, order_of_tile
from easyctx.kernel.torch_cuda import packed_arguments
from easyctx.kernel.values import Saved

ARCH = 90
HEAD_DIM_MULTIPLE = 32  # of the sums' rows
LONGEST_TILE = 128


class Statistics(NamedTuple):
    """What the backward needs of the forward for each query, float32 `[B, H, S rounded up]`."""

    dpsum: torch.Tensor
    lse_log2: torch.Tensor


def tile_rows(head_dim: int, *, is_full: bool) -> int:
    """Queries to a tile of dq's sums, which are other ones for blocks without a mask."""
    return config_of(head_dim, is_full).m_block_size


def tile_keys(head_dim: int) -> int:
    """Keys to a tile of the sums of dk and dv."""
    return config_of(head_dim, False).n_block_size


def new_sums(length: int, tile: int, like_BSHD: torch.Tensor) -> torch.Tensor:
    """Memory for the sums of `length` tokens: float32 `[B, H, length rounded up * D]`, not cleared."""
    batch, _, heads, head_dim = like_BSHD.shape
    rounded = -(-length // tile) * tile
    return torch.empty((batch, heads, rounded * head_dim), dtype=torch.float32, device=like_BSHD.device)


def new_statistic(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Memory for one of `Statistics`, of `shape`, with something harmless to read where it ends.

    The last tile of a kernel may reach beyond the queries, whose number was rounded up for tiles of another size.
    """
    size = math.prod(shape)
    memory = torch.empty(size + LONGEST_TILE, dtype=torch.float32, device=device)
    memory[size:].zero_()
    return memory[:size].view(shape)


def prepare(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, tile: int) -> tuple[Statistics, torch.Tensor]:
    """Statistics of all queries, and cleared sums for their dq. out and dout `[B, S, H, D]`, lse `[B, H, S]`."""
    batch, length, heads, head_dim = out.shape
    dq_sums = new_sums(length, tile, out)
    rounded = dq_sums.shape[2] // head_dim
    statistics = Statistics(*(new_statistic((batch, heads, rounded), out.device) for _ in range(2)))
    _preprocess(out, dout, lse, statistics, dq_sums, tile, None)
    return statistics, dq_sums


def _preprocess(
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    statistics: Statistics,
    dq_sums: torch.Tensor,
    tile: int,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Fill in the statistics and clear the sums."""
    head_dim = out.shape[-1]
    with COMPILING:
        _bwd_preprocess(
            out, dout, statistics.dpsum, lse, statistics.lse_log2, dq_sums, cu_seqlens, None, None,
            torch2cute_dtype_map[out.dtype], head_dim, head_dim, tile,
            fake_mode=False, hdim_multiple_of=HEAD_DIM_MULTIPLE,
        )  # fmt: skip


def differentiate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    statistics: Statistics,
    dq_sums: torch.Tensor,
    dk_sums: torch.Tensor,
    dv_sums: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    is_full: bool,
    causal: bool,
    left: int | None,
    right: int | None,
    cu_seqlens: torch.Tensor | None = None,
) -> None:
    """Add a block's gradients to sums that begin where q and k do; is_full: the block has no mask.

    With cu_seqlens (documents) tensors lack the batch dim, and sums have a place for each document's tiles.
    """
    group, packed = q.shape[-2] // k.shape[-2], cu_seqlens is not None
    kernel = compiled(
        q.dtype, q.shape[-1], group, is_full, causal, left is not None, right is not None, softcap, packed
    )
    kernel(
        q, k, v, dout, statistics.lse_log2, statistics.dpsum, dq_sums, dk_sums, dv_sums, scale,
        cu_seqlens, cu_seqlens, None, None, left, right, None, None, None, AuxData(None, None), None, None,
    )  # fmt: skip


def differentiate_apart(
    saved: Saved,
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    is_full: bool,
    causal: bool,
    left: int | None,
    right: int | None,
) -> None:
    """Add a block's gradients to dq, dk and dv, all float32 and `[B, S, heads, D]`, whose tiles begin elsewhere."""
    q, k, v, out, lse = saved
    row_tile, key_tile = tile_rows(q.shape[-1], is_full=is_full), tile_keys(q.shape[-1])
    statistics, dq_sums = prepare(out, dout, lse.contiguous(), row_tile)
    dk_sums, dv_sums = (new_sums(k.shape[1], key_tile, k).zero_() for _ in range(2))
    differentiate(
        q, k, v, dout, statistics, dq_sums, dk_sums, dv_sums, scale=scale, softcap=softcap, is_full=is_full,
        causal=causal, left=left, right=right,
    )  # fmt: skip
    _add_sums((dq, dk, dv), (dq_sums, dk_sums, dv_sums), (row_tile, key_tile), scale)


def differentiate_packed(
    saved: Saved,
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cuts: tuple[int, ...],
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
    left: int | None,
    right: int | None,
) -> None:
    """Add the gradients of a chain of squares to dq, dk and dv, all float32 and `[S, heads, D]`, as `saved` is."""
    q, k, v, out, lse = saved
    head_dim, device = q.shape[-1], q.device
    cu_seqlens, _ = packed_arguments(cuts, device)
    row_tile, key_tile = tile_rows(head_dim, is_full=False), tile_keys(head_dim)
    length, key_length = (_padded_length(cuts, tile) for tile in (row_tile, key_tile))
    dq_sums = torch.empty((q.shape[1], length * head_dim), dtype=torch.float32, device=device)
    dk_sums, dv_sums = torch.zeros((2, k.shape[1], key_length * head_dim), dtype=torch.float32, device=device)
    statistics = Statistics(*(new_statistic((q.shape[1], length), device) for _ in range(2)))
    _preprocess(out, dout, lse.contiguous(), statistics, dq_sums, row_tile, cu_seqlens)
    differentiate(
        q, k, v, dout, statistics, dq_sums, dk_sums, dv_sums, scale=scale, softcap=softcap, is_full=False,
        causal=causal, left=left, right=right, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    rows, sums = ([t.unsqueeze(0) for t in three] for three in ((dq, dk, dv), (dq_sums, dk_sums, dv_sums)))
    _add_sums(rows, sums, (row_tile, key_tile), scale, cuts)


def _add_sums(
    into: Sequence[torch.Tensor],
    sums: Sequence[torch.Tensor],
    tiles: tuple[int, int],
    scale: float,
    cuts: tuple[int, ...] = (),
) -> None:
    """Add sums of dq, dk and dv to their rows; tiles: of the rows of dq, and of keys."""
    device, head_dim = into[0].device, into[0].shape[-1]
    of_rows, of_keys = order_of_rows(head_dim, tiles[0], device), order_of_keys(head_dim, device)
    orders, tile_of, scales = (of_rows, of_keys, of_keys), (tiles[0], tiles[1], tiles[1]), (scale, scale, 1.0)
    for rows, values, order, tile, factor in zip(into, sums, orders, tile_of, scales, strict=True):
        positions = _padded_positions(cuts, tile, device) if cuts else None
        collect([(values, order, tile)], factor, rows, rows.shape, rows.dtype, out=rows, positions=positions)


def _padded_length(cuts: tuple[int, ...], tile: int) -> int:
    """Rows of the library's sums over documents, each of which begins at the border of a tile."""
    return (cuts[-1] + len(cuts) * tile - 1) // tile * tile


@lru_cache(maxsize=64)
def _padded_positions(cuts: tuple[int, ...], tile: int, device: torch.device) -> torch.Tensor:
    """int64 `[S]`: which row of the library's sums each row is."""
    starts = [(start + i * tile) // tile * tile for i, start in enumerate(cuts[:-1])]
    rows = [torch.arange(b - a) + start for a, b, start in zip(cuts[:-1], cuts[1:], starts, strict=True)]
    return torch.cat(rows).to(device)


def order_of_rows(head_dim: int, tile: int, device: torch.device) -> torch.Tensor:
    """The order of dq's sums within a tile (see `order.py`)."""
    is_full = tile != tile_rows(head_dim, is_full=False)
    config = config_of(head_dim, is_full)
    threads = 128 if config.dQ_single_wg else config.num_wg * 128
    return _order(head_dim, tile, threads, config.AtomLayoutMdQ, config.dQ_swapAB, device)


def order_of_keys(head_dim: int, device: torch.device) -> torch.Tensor:
    """The order of the sums of dk and dv within a tile."""
    config = config_of(head_dim, False)
    return _order(head_dim, config.n_block_size, config.num_wg * 128, config.AtomLayoutNdKV, config.dKV_swapAB, device)


@compiled_once
def _order(head_dim: int, tile: int, threads: int, atoms: int, swap: bool, device: torch.device) -> torch.Tensor:
    def convert(sums: torch.Tensor, to: torch.Tensor) -> None:
        _bwd_postprocess_convert(
            sums, to, 1.0, None, None, ARCH, torch2cute_dtype_map[to.dtype], head_dim, tile, threads, atoms, swap,
            fake_mode=False, hdim_multiple_of=HEAD_DIM_MULTIPLE,
        )  # fmt: skip

    return order_of_tile(convert, tile, head_dim, device)
