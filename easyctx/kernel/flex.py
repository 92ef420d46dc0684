"""PyTorch's FlexAttention, compiled: what the other CUDA kernels lack, above all a softcap on wide heads or older GPUs.

Its backward knows its own block only, not the outputs merged over all blocks that easyctx's kernels are given. But the
merged output is a function of the blocks' (out, lse), and FlexAttention is differentiable in both, so that the chain
rule gives the same gradients: with w = exp(lse of the block - merged lse),

    d(out of the block) = w dout            d(lse of the block) = w dout . (out of the block - merged out)

It has to make the block's out and lse again for it: the backward costs a forward more than that of other kernels.
"""

import importlib.util
from functools import cache, lru_cache
from typing import Any

import torch

from easyctx.band import Band
from easyctx.kernel.base import Kernel, Workload, transpose
from easyctx.kernel.torch_cuda import refuses_on_cuda
from easyctx.kernel.values import Gradients, Saved, Score

SMALLEST_TILE = 128  # tokens on a side of what is skipped or left unmasked as a whole
MOST_TILES = 1024  # on a side, so that the table of them stays small
MOST_GRAPHS = 64  # of shapes, bands and settings that are compiled, before it is an error


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it would hold all scores of a block, so a failure to compile must be an error.
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class Flex(Kernel):
    """`torch.nn.attention.flex_attention`: GQA, windows, documents, softcap."""

    name = "flex"

    def refuses(self, work: Workload) -> str | None:
        if reason := refuses_on_cuda(work, max_head_dim=256):
            return reason
        return None if _has_triton() else "needs triton to compile: pip install triton"

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(q_BSHD, k_BSKD, v_BSKD, (), band, score)

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        return _backward(dout_BSHD, saved, (), band, score)

    def forward_packed(
        self,
        q_BSHD: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        cuts: tuple[int, ...],
        band: Band,
        score: Score,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(q_BSHD, k_BSKD, v_BSKD, cuts, band, score)

    def backward_packed(
        self, dout_BSHD: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score
    ) -> Gradients:
        return _backward(dout_BSHD, saved, cuts, band, score)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: tuple[int, ...], band: Band, score: Score
) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[B, S, H, D]` and lse `[B, H, S]`."""
    from torch.nn.attention.flex_attention import AuxRequest

    # A scale or softcap that becomes an argument of the graph, which Dynamo tries at the second one, does not trace.
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, specialize_float=True):
        out, aux = _compiled()(
            *transpose(q, k, v),
            score_mod=_softcap(score.softcap),
            block_mask=_block_mask(q.shape[1], k.shape[1], cuts, band, q.device, torch.is_inference_mode_enabled()),
            scale=score.scale,
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=AuxRequest(lse=True),
            # Left to choose, it takes its decoding kernel for few queries, and then finds no tiles for some shapes.
            kernel_options={"BACKEND": "TRITON"},
        )
    return out.transpose(1, 2), aux.lse


def _backward(dout: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score) -> Gradients:
    q, k, v, merged_out, merged_lse = saved
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    # A custom operator, in which kernels run, switches the recording of gradients off at this level too.
    recorded = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), recorded:
        out, lse = _forward(q, k, v, cuts, band, score)
        with torch.no_grad():
            weight = (lse - merged_lse).exp().transpose(1, 2).unsqueeze(-1)
            d_out = (dout * weight).to(out.dtype)
            # From the rounded d_out, which the library sums as well: what cancels must cancel.
            beyond = out.to(lse.dtype) - merged_out.to(lse.dtype)
            d_lse = (d_out.to(lse.dtype) * beyond).sum(-1).transpose(1, 2)
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (d_out, d_lse))
    return dq, dk, dv


@cache
def _softcap(softcap: float | None) -> Any:
    if softcap is None:
        return None

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@lru_cache(maxsize=16)
def _block_mask(
    num_queries: int, num_keys: int, cuts: tuple[int, ...], band: Band, device: torch.device, _inference: bool
) -> Any:
    """The mask as FlexAttention takes it, or None where nothing is masked.

    All masks here let a query see one stretch of keys, so two numbers a query say everything and one compiled kernel
    serves all of them. Kept for the layers of a step; those made in inference mode are of no use out of it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if band.is_full and not cuts:
        return None
    first, last = visible_stretch(num_queries, num_keys, cuts, band, device)

    def visible(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[query]) & (key <= last[query])

    tile = SMALLEST_TILE
    while tile * MOST_TILES < max(num_queries, num_keys):
        tile *= 2
    partial, full = _tiles(first, last, num_keys, tile)
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=tile, mask_mod=visible, seq_lengths=(num_queries, num_keys)
    )


def visible_stretch(
    num_queries: int, num_keys: int, cuts: tuple[int, ...], band: Band, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last key that each query sees, int64 `[num_queries]` each, both ascending."""
    query = torch.arange(num_queries, device=device)
    first, last = torch.zeros_like(query), torch.full_like(query, num_keys - 1)
    if band.low is not None:
        first = (query + band.low).clamp(min=0)
    if band.high is not None:
        last = (query + band.high).clamp(max=num_keys - 1)
    if cuts:
        borders = torch.tensor(cuts, device=device)
        square = torch.searchsorted(borders, query, right=True)
        first, last = torch.maximum(first, borders[square - 1]), torch.minimum(last, borders[square] - 1)
    return first, last


def _tiles(first: torch.Tensor, last: torch.Tensor, num_keys: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[query tiles, key tiles]`: which hold keys that are seen by some queries only, and which by all."""
    tops = torch.arange(0, len(first), tile, device=first.device)
    bottoms = (tops + tile).clamp(max=len(first)) - 1
    left = torch.arange(0, num_keys, tile, device=first.device)
    right = (left + tile).clamp(max=num_keys) - 1
    some = (right >= first[tops][:, None]) & (left <= last[bottoms][:, None])
    full = (left >= first[bottoms][:, None]) & (right <= last[tops][:, None])
    return some & ~full, full


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row of tiles how many are set, and their indices first: int32 `[1, 1, rows(, columns)]`."""
    indices = tiles.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None].contiguous()
