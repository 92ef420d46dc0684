"""The backward kernel over running sums: blocks add to dq, dk and dv in float32, and one conversion ends it.

The library's backward adds to float32 sums anyway, in an order of its own (tile after tile, as the matrix units hold
them), and rounds them with a kernel of its own. So a block's gradients need no pass of theirs when the sums are not
cleared between blocks. What a block's q and k must then do is begin at the border of a tile.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import cutlass.cute as cute
import torch
from flash_attn.cute import utils
from flash_attn.cute.cute_dsl_utils import to_cute_tensor
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.interface import (
    _bwd_postprocess_convert,
    _bwd_preprocess,
    _tile_size_bwd_sm90,
    torch2cute_dtype_map,
)
from flash_attn.cute.utils import AuxData

from easyctx.kernel.hopper import COMPILING, compiled_once
from easyctx.kernel.hopper.order import order_of_tile

ARCH = 90
HEAD_DIM_MULTIPLE = 32  # of the sums' rows
LONGEST_TILE = 128


class _Group(int):
    """A number of query heads to a key head that never passes for 1.

    With 1 the library would write dk and dv once, rounded, instead of adding to sums.
    """

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: Any) -> bool:
        return True

    __hash__ = int.__hash__


class Statistics(NamedTuple):
    """What the backward needs of the forward for each query, float32 `[B, H, S rounded up]`."""

    dpsum: torch.Tensor
    lse_log2: torch.Tensor


def tile_rows(head_dim: int, *, is_full: bool) -> int:
    """Queries to a tile of dq's sums, which are other ones for blocks without a mask."""
    return _config(head_dim, is_full).m_block_size


def tile_keys(head_dim: int) -> int:
    """Keys to a tile of the sums of dk and dv."""
    return _config(head_dim, False).n_block_size


@cache
def _config(head_dim: int, is_full: bool) -> Any:
    # A causal block's tiles for every mask, so that all of these can share sums.
    return _tile_size_bwd_sm90(head_dim, head_dim, causal=not is_full, local=False)


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
    with COMPILING:
        _bwd_preprocess(
            out, dout, statistics.dpsum, lse, statistics.lse_log2, dq_sums, None, None, None,
            torch2cute_dtype_map[out.dtype], head_dim, head_dim, tile,
            fake_mode=False, hdim_multiple_of=HEAD_DIM_MULTIPLE,
        )  # fmt: skip
    return statistics, dq_sums


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
) -> None:
    """Add a block's gradients to sums that begin where q and k do; is_full: the block has no mask."""
    group = q.shape[-2] // k.shape[-2]
    kernel = _compiled(q.dtype, q.shape[-1], group, is_full, causal, left is not None, right is not None, softcap)
    kernel(
        q, k, v, dout, statistics.lse_log2, statistics.dpsum, dq_sums, dk_sums, dv_sums, scale,
        None, None, None, None, left, right, None, None, None, AuxData(None, None), None, None,
    )  # fmt: skip


def order_of_rows(head_dim: int, tile: int, device: torch.device) -> torch.Tensor:
    """The order of dq's sums within a tile (see `order.py`)."""
    is_full = tile != tile_rows(head_dim, is_full=False)
    config = _config(head_dim, is_full)
    threads = 128 if config.dQ_single_wg else config.num_wg * 128
    return _order(head_dim, tile, threads, config.AtomLayoutMdQ, config.dQ_swapAB, device)


def order_of_keys(head_dim: int, device: torch.device) -> torch.Tensor:
    """The order of the sums of dk and dv within a tile."""
    config = _config(head_dim, False)
    return _order(head_dim, config.n_block_size, config.num_wg * 128, config.AtomLayoutNdKV, config.dKV_swapAB, device)


@compiled_once
def _order(head_dim: int, tile: int, threads: int, atoms: int, swap: bool, device: torch.device) -> torch.Tensor:
    def convert(sums: torch.Tensor, to: torch.Tensor) -> None:
        _bwd_postprocess_convert(
            sums, to, 1.0, None, None, ARCH, torch2cute_dtype_map[to.dtype], head_dim, tile, threads, atoms, swap,
            fake_mode=False, hdim_multiple_of=HEAD_DIM_MULTIPLE,
        )  # fmt: skip

    return order_of_tile(convert, tile, head_dim, device)


@compiled_once
def _compiled(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    is_full: bool,
    causal: bool,
    has_left: bool,
    has_right: bool,
    softcap: float | None,
) -> Any:
    config = _config(head_dim, is_full)
    kernel = FlashAttentionBackwardSm90(
        torch2cute_dtype_map[dtype],
        head_dim,
        head_dim,
        _Group(group),
        causal,
        is_local=has_left or has_right,
        deterministic=False,
        tile_m=config.m_block_size,
        tile_n=config.n_block_size,
        Q_stage=config.num_stages_Q,
        dO_stage=config.num_stages_dO,
        PdS_stage=config.num_stages_PdS,
        SdP_swapAB=config.SdP_swapAB,
        dKV_swapAB=config.dKV_swapAB,
        dQ_swapAB=config.dQ_swapAB,
        AtomLayoutMSdP=config.AtomLayoutMSdP,
        AtomLayoutNdKV=config.AtomLayoutNdKV,
        AtomLayoutMdQ=config.AtomLayoutMdQ,
        num_threads=(config.num_wg + 1) * 128,
        V_in_regs=False,
        score_mod=utils.create_softcap_scoremod(softcap) if softcap else None,
        score_mod_bwd=utils.create_softcap_scoremod_bwd(softcap) if softcap else None,
        mask_mod=None,
        has_aux_tensors=False,
        q_subtile_factor=2,
        dQ_single_wg=config.dQ_single_wg,
    )
    # Sizes are free in what is compiled; these only show the ranks, dtypes and alignments.
    q_like, k_like = (torch.empty((1, 512, heads, head_dim), dtype=dtype, device="cuda") for heads in (2 * group, 2))
    statistics = torch.empty((1, 2 * group, 512), device="cuda")
    dq_sums, dkv_sums = (torch.empty((1, heads, 512 * head_dim), device="cuda") for heads in (2 * group, 2))
    q, k, of_query, dq, dkv = (to_cute_tensor(t) for t in (q_like, k_like, statistics, dq_sums, dkv_sums))
    return cute.compile(
        kernel, q, k, k, q, of_query, of_query, dq, dkv, dkv, 1.0,
        None, None, None, None, 1 if has_left else None, 1 if has_right else None, None, None, None,
        AuxData(None, None), None, None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
