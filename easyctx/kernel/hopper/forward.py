"""The forward kernel with a merging epilogue: a block's output is folded into the output of the blocks before it.

The running output is kept as two half-precision tensors, its rounded value and what rounding left over (`out` and
`rest`), which together hold 16 bits of mantissa in bfloat16 and 22 in float16. A block costs one read and one write
of them, inside the kernel, and when the last block is done `out` is the result as it is.
"""

import math
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr
from flash_attn.cute import utils
from flash_attn.cute.cute_dsl_utils import assume_tensor_aligned, to_cute_tensor
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.interface import _tile_size_fwd_sm90, torch2cute_dtype_map
from flash_attn.cute.utils import AuxData
from quack import layout_utils

from easyctx.kernel.hopper import compiled_once


class MergingForward(FlashAttentionForwardSm90):
    """The library's kernel, ending in `epilogue` below.

    is_first: nothing came before this block, so there is nothing to read.
    keeps_rest: the rest is written too (not of a block that is the only one).
    """

    def __init__(self, *args: Any, is_first: bool, keeps_rest: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_first, self.keeps_rest = is_first, keeps_rest

    # The library sets it as it starts; with it the output would leave through shared memory, rounded.
    use_tma_O = property(lambda self: False, lambda self, value: None)

    def mma(self, *args: Any, **kwargs: Any) -> Any:
        # Takes `rest` from the extra tensors that the library hands through to here, but not on to the epilogue.
        aux = next(a for a in (*args, *kwargs.values()) if isinstance(a, AuxData))
        self.rest = None if aux.tensors is None else aux.tensors[0]
        return FlashAttentionForwardSm90.mma(self, *args, **kwargs)

    def _rest_like_out(self) -> cute.Tensor:
        """`rest` with the modes that the library gave the output: (rows, head dim, heads[, batch])."""
        order = [1, 3, 2, 0] if const_expr(cute.rank(self.rest) == 4) else [0, 2, 1]
        return layout_utils.select(assume_tensor_aligned(self.rest), order)

    def _rows_of_thread(
        self, tensor: cute.Tensor, seqlen: Any, thr_mma: Any, m_block: Int32, head_idx: Int32, batch_idx: Int32
    ) -> cute.Tensor:
        """(rows, columns) of this thread's accumulators in a tensor like the output."""
        whole = seqlen.offset_batch_Q(tensor, batch_idx, dim=3)[None, None, head_idx]
        tile = cute.local_tile(whole, (self.tile_m, self.tile_hdimv), (m_block, 0))
        return layout_utils.reshape_acc_to_mn(thr_mma.partition_C(tile))

    @cute.jit
    def epilogue(
        self,
        acc_O: cute.Tensor,
        lse: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        sO: cute.Tensor,
        seqlen: Any,
        gmem_tiled_copy_O: cute.TiledCopy,
        tma_atom_O: Any,
        tiled_mma: cute.TiledMma,
        tidx: Int32,
        m_block: Int32,
        head_idx: Int32,
        batch_idx: Int32,
    ):
        thr_mma = tiled_mma.get_slice(tidx)
        acc = layout_utils.reshape_acc_to_mn(acc_O)
        place = layout_utils.reshape_acc_to_mn(
            thr_mma.partition_C(cute.make_identity_tensor((self.tile_m, self.tile_hdimv)))
        )
        out = self._rows_of_thread(mO, seqlen, thr_mma, m_block, head_idx, batch_idx)
        rest: Any = None
        if const_expr(self.rest is not None):
            rest = self._rows_of_thread(self._rest_like_out(), seqlen, thr_mma, m_block, head_idx, batch_idx)
        lse_of_head = seqlen.offset_batch_Q(mLSE, batch_idx, dim=2)[None, head_idx]
        gLSE = cute.local_tile(lse_of_head, (self.tile_m,), (m_block,))
        limit = seqlen.seqlen_q - m_block * self.tile_m

        old_lse = cute.make_rmem_tensor_like(lse, Float32)
        if const_expr(not self.is_first):
            for m in cutlass.range_constexpr(cute.size(acc, mode=[0])):
                old_lse[m] = gLSE[place[m, 0][0]] if place[m, 0][0] < limit else -Float32.inf
            cute.arch.sync_warp()  # all threads of a row have read it before one of them writes it
        for m in cutlass.range_constexpr(cute.size(acc, mode=[0])):
            if place[m, 0][0] < limit:
                new = cute.make_rmem_tensor_like(acc[m, None], Float32)
                new.store(acc[m, None].load())
                total = lse[m]
                if const_expr(not self.is_first):
                    highest = cutlass.max(old_lse[m], lse[m])
                    reference = highest if highest != -Float32.inf else Float32(0.0)
                    old_weight = cute.math.exp2((old_lse[m] - reference) * math.log2(math.e), fastmath=True)
                    new_weight = cute.math.exp2((lse[m] - reference) * math.log2(math.e), fastmath=True)
                    both = old_weight + new_weight
                    inverse = 1.0 / both if both > 0.0 else Float32(0.0)
                    total = (
                        reference + cute.math.log2(both, fastmath=True) * math.log(2.0) if both > 0.0 else -Float32.inf
                    )
                    old = cute.make_rmem_tensor_like(new, self.dtype)
                    old_rest = cute.make_rmem_tensor_like(new, self.dtype)
                    cute.autovec_copy(out[m, None], old)
                    cute.autovec_copy(rest[m, None], old_rest)
                    before = old.load().to(Float32) + old_rest.load().to(Float32)
                    new.store(before * (old_weight * inverse) + new.load() * (new_weight * inverse))
                rounded = cute.make_rmem_tensor_like(new, self.dtype)
                rounded.store(new.load().to(self.dtype))
                cute.autovec_copy(rounded, out[m, None])
                if const_expr(self.keeps_rest):
                    left = cute.make_rmem_tensor_like(new, self.dtype)
                    left.store((new.load() - rounded.load().to(Float32)).to(self.dtype))
                    cute.autovec_copy(left, rest[m, None])
                if place[m, 0][1] == 0:
                    gLSE[place[m, 0][0]] = total


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    rest: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
    left: int | None,
    right: int | None,
    cu_seqlens: torch.Tensor | None,
    is_first: bool,
    keeps_rest: bool,
) -> None:
    """Fold the attention of q over k and v into out, rest and lse.

    Shapes `[B, S, H, D]`, or `[S, H, D]` with cu_seqlens; lse `[B, H, S]` or `[H, S]`. Masks as the library counts
    them, from the bottom right corner.
    """
    is_local = left is not None or right is not None
    kernel = _compiled(
        q.dtype, q.shape[-1], q.shape[-2] // k.shape[-2], causal, left is not None, right is not None, is_local,
        softcap, cu_seqlens is not None, is_first, keeps_rest, rest is not None,
    )  # fmt: skip
    aux = AuxData([rest], None) if rest is not None else AuxData(None, None)
    kernel(q, k, v, out, lse, scale, cu_seqlens, cu_seqlens, None, None, None, left, right, None, None, aux, None, None)


@compiled_once
def _compiled(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    causal: bool,
    has_left: bool,
    has_right: bool,
    is_local: bool,
    softcap: float | None,
    packed: bool,
    is_first: bool,
    keeps_rest: bool,
    has_rest: bool,
) -> Any:
    config = _tile_size_fwd_sm90(head_dim, head_dim, causal, is_local)
    kernel = MergingForward(
        torch2cute_dtype_map[dtype],
        head_dim,
        head_dim,
        group,
        is_causal=causal,
        is_local=is_local,
        pack_gqa=False,  # measured: no faster at these lengths, and rows of the output stay rows
        tile_m=config.m_block_size,
        tile_n=config.n_block_size,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=config.intra_wg_overlap,
        mma_pv_is_rs=config.mma_pv_is_rs,
        mask_mod=None,
        score_mod=utils.create_softcap_scoremod(softcap) if softcap else None,
        has_aux_tensors=False,
        is_first=is_first,
        keeps_rest=keeps_rest,
    )
    shape = (256, 2 * group, head_dim) if packed else (1, 256, 2 * group, head_dim)
    like = torch.empty(shape, dtype=dtype, device="cuda")
    keys = torch.empty((*shape[:-2], 2, head_dim), dtype=dtype, device="cuda")
    lse = torch.empty((*shape[:-3], shape[-2], shape[-3]), device="cuda")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="cuda") if packed else None
    q, out, rest, k = (to_cute_tensor(t) for t in (like, like, like if has_rest else None, keys))
    cu = to_cute_tensor(cu_seqlens, assumed_align=4, leading_dim=0)
    return cute.compile(
        kernel,
        q,
        k,
        k,
        out,
        to_cute_tensor(lse, assumed_align=4),
        1.0,
        cu,
        cu,
        None,
        None,
        None,
        1 if has_left else None,
        1 if has_right else None,
        None,
        None,
        AuxData([rest] if has_rest else None, None),
        None,
        None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )
