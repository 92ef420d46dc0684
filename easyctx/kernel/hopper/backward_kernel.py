"""The library's backward kernel, compiled so that it adds to the sums it is given."""

from functools import cache
from typing import Any

import cutlass.cute as cute
import torch
from flash_attn.cute import utils
from flash_attn.cute.cute_dsl_utils import to_cute_tensor
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.interface import _tile_size_bwd_sm90, torch2cute_dtype_map
from flash_attn.cute.utils import AuxData

from easyctx.kernel.hopper import compiled_once


class _Group(int):
    """A number of query heads to a key head that never passes for 1.

    With 1 the library would write dk and dv once, rounded, instead of adding to sums.
    """

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: Any) -> bool:
        return True

    __hash__ = int.__hash__


@cache
def config_of(head_dim: int, is_full: bool) -> Any:
    # A causal block's tiles for every mask, so that all of these can share sums.
    return _tile_size_bwd_sm90(head_dim, head_dim, causal=not is_full, local=False)


@compiled_once
def compiled(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    is_full: bool,
    causal: bool,
    has_left: bool,
    has_right: bool,
    softcap: float | None,
    packed: bool,
) -> Any:
    config = config_of(head_dim, is_full)
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
    batch = () if packed else (1,)
    q_like, k_like = (
        torch.empty((*batch, 512, heads, head_dim), dtype=dtype, device="cuda") for heads in (2 * group, 2)
    )
    statistics = torch.empty((*batch, 2 * group, 512), device="cuda")
    dq_sums, dkv_sums = (torch.empty((*batch, heads, 512 * head_dim), device="cuda") for heads in (2 * group, 2))
    q, k, of_query, dq, dkv = (to_cute_tensor(t) for t in (q_like, k_like, statistics, dq_sums, dkv_sums))
    cu = to_cute_tensor(torch.empty(3, dtype=torch.int32, device="cuda"), assumed_align=4) if packed else None
    return cute.compile(
        kernel, q, k, k, q, of_query, of_query, dq, dkv, dkv, 1.0,
        cu, cu, None, None, 1 if has_left else None, 1 if has_right else None, None, None, None,
        AuxData(None, None), None, None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
