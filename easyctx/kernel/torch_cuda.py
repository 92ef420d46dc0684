"""The two attention ops inside PyTorch's CUDA build that return the log-sum-exp: cuDNN's and FlashAttention-2."""

import itertools
from functools import lru_cache
from typing import Any

import torch

from easyctx.band import Band, Block, clip_rows
from easyctx.kernel.base import Kernel, VarlenKernel, Workload, transpose
from easyctx.kernel.values import Gradients, Saved, Score, exact_dtype

HALF = (torch.bfloat16, torch.float16)
Lengths = tuple[torch.Tensor | None, torch.Tensor | None, int, int]
FlashMask = tuple[bool, dict[str, int]]


def refuses_on_cuda(work: Workload, max_head_dim: int) -> str | None:
    """What all CUDA kernels refuse alike."""
    if work.device.type != "cuda":
        return f"runs on CUDA only, not on {work.device.type}"
    if work.dtype not in HALF:
        return f"takes bfloat16 or float16, not {work.dtype}"
    if work.head_dim > max_head_dim or work.head_dim % 8:
        return f"takes head dims that are multiples of 8 up to {max_head_dim}, not {work.head_dim}"
    return None


def packed_arguments(cuts: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """cu_seqlens (int32, on the device) and the longest square of a chain, as flash-attention's libraries want them."""
    lengths = [b - a for a, b in itertools.pairwise(cuts)]
    return _cu_seqlens(cuts, device), max(lengths)


@lru_cache(maxsize=64)
def _cu_seqlens(cuts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Kept, so that the layers of a step share one copy to the device.
    return torch.tensor(cuts, dtype=torch.int32, device=device)


class Cudnn(Kernel):
    """cuDNN's fused attention through `aten::_scaled_dot_product_cudnn_attention`: GQA, no windows, no documents."""

    name = "cudnn"

    def refuses(self, work: Workload) -> str | None:
        if reason := refuses_on_cuda(work, max_head_dim=128):
            return reason
        if torch.cuda.get_device_capability(work.device) < (8, 0):
            return "needs compute capability 8.0 or higher"
        if work.softcapped:
            return "has no softcap"
        if work.packed:  # documents of one token, above all, are not supported
            return "has no documents"
        return "has no sliding window" if work.windowed else None

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        causal = _causal_flag(self.name, q_BSHD, k_BSKD, band)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *transpose(q_BSHD, k_BSKD, v_BSKD), None, True, 0.0, causal, scale=score.scale
        )
        return out.transpose(1, 2), lse.squeeze(-1)

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS = saved
        seed = torch.zeros((), dtype=torch.int64, device=q_BSHD.device)  # of dropout, which is off
        causal = _causal_flag(self.name, q_BSHD, k_BSKD, band)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *transpose(dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD),
            lse_BHS.contiguous().unsqueeze(-1),
            seed,
            seed,
            None,
            None,
            None,
            q_BSHD.shape[1],
            k_BSKD.shape[1],
            0.0,
            causal,
            scale=score.scale,
        )
        dq, dk, dv = transpose(dq, dk, dv)
        return dq, dk, dv


class FlashBlocks(VarlenKernel):
    """A library that takes masks as FlashAttention-2 does: GQA, windows, documents.

    `call_forward` and `call_backward` are its own functions: lengths are cu_seqlens of queries and keys (both None for
    a batch) and the longest of each; a mask is whether it is causal, and window sizes by their names.
    """

    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, mask: FlashMask, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def call_backward(
        self, dout: torch.Tensor, saved: Saved, lengths: Lengths, mask: FlashMask, score: Score
    ) -> Gradients:
        raise NotImplementedError

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            self.call_forward(q_BSHD[:, part.q], k_BSKD[:, part.k], v_BSKD[:, part.k], *_flash_arguments(part), score)
            for part in blocks_of_rows(q_BSHD.shape[1], k_BSKD.shape[1], band)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=2)

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        blocks = blocks_of_rows(saved.q_BSHD.shape[1], saved.k_BSKD.shape[1], band)
        parts = [
            self.call_backward(
                dout_BSHD[:, part.q], saved.of_block(part.rows, part.q, part.k), *_flash_arguments(part), score
            )
            for part in blocks
        ]
        if len(parts) == 1:
            return parts[0]
        dk, dv = torch.zeros((2, *saved.k_BSKD.shape), dtype=exact_dtype(dout_BSHD.dtype), device=dout_BSHD.device)
        for part, (_, of_keys, of_values) in zip(blocks, parts, strict=True):
            dk[:, part.k] += of_keys
            dv[:, part.k] += of_values
        return torch.cat([dq for dq, _, _ in parts], dim=1), dk, dv

    def forward_flat(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: tuple[int, ...], band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens, longest = packed_arguments(cuts, q.device)
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        return self.call_forward(q, k, v, lengths, _flash_mask(band, longest, longest), score)

    def backward_flat(
        self, dout: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score
    ) -> Gradients:
        cu_seqlens, longest = packed_arguments(cuts, dout.device)
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        return self.call_backward(dout, saved, lengths, _flash_mask(band, longest, longest), score)


class TorchFlash(FlashBlocks):
    """FlashAttention-2 as PyTorch carries it (`aten::_flash_attention_forward`): GQA, windows."""

    name = "torch_flash"

    def refuses(self, work: Workload) -> str | None:
        if reason := refuses_on_cuda(work, max_head_dim=256):
            return reason
        if torch.cuda.get_device_capability(work.device) < (8, 0):
            return "needs compute capability 8.0 or higher"
        return "has no softcap" if work.softcapped else None

    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, mask: FlashMask, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_forward(q, k, v, lengths, mask, score)

    def call_backward(
        self, dout: torch.Tensor, saved: Saved, lengths: Lengths, mask: FlashMask, score: Score
    ) -> Gradients:
        return flash_backward(dout, saved, lengths, mask, score)


def blocks_of_rows(num_queries: int, num_keys: int, band: Band) -> list[Block]:
    """A block in parts, by rows, whose windows FlashAttention-2 takes as they are.

    It counts a window from the bottom right corner, and takes a side that is open, or as wide as there are keys, for
    exactly that wide. Where queries outnumber keys, that masks keys of the first rows, or all of them. So the rows
    that see every key are a part of their own, which leaves no more rows above and below it than there are keys.
    """
    whole = Block(slice(0, num_queries), slice(0, num_keys), band)
    if band.is_full or num_queries <= num_keys:
        return [whole]
    first = 0 if band.high is None else max(0, num_keys - 1 - band.high)
    stop = num_queries if band.low is None else min(num_queries, 1 - band.low)
    borders = [0, first, stop, num_queries] if first < stop else [*range(0, num_queries, num_keys), num_queries]
    parts = [clip_rows(whole, slice(a, b)) for a, b in itertools.pairwise(borders) if a < b]
    return [part for part in parts if part is not None]


def _flash_arguments(block: Block) -> tuple[Lengths, FlashMask]:
    num_queries, num_keys = block.q.stop - block.q.start, block.k.stop - block.k.start
    return (None, None, num_queries, num_keys), _flash_mask(block.band, num_queries, num_keys)


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[Any, ...], mask: tuple[Any, ...], score: Score
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the op itself.

    lengths: cu_seqlens of queries and keys (both None for a batch) and the longest of each.
    mask: whether it is causal, and window sizes by their names in the op.
    """
    causal, window = mask
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, causal, False, scale=score.scale, **window
    )
    return out, lse


def flash_backward(
    dout: torch.Tensor, saved: Saved, lengths: tuple[Any, ...], mask: tuple[Any, ...], score: Score
) -> Gradients:
    """dq, dk and dv of `flash_forward`."""
    q, k, v, out, lse = saved
    causal, window = mask
    rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
    unused = torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out,
        lse.contiguous(),
        *lengths,
        0.0,
        causal,
        rng,
        unused,
        scale=score.scale,
        **window,
    )


def _causal_flag(name: str, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, band: Band) -> bool:
    if band.is_full:
        return False
    # Kernels differ in where a rectangle's diagonal starts; on squares they agree.
    if band.is_causal and q_BSHD.shape[1] == k_BSKD.shape[1]:
        return True
    raise ValueError(f"{name} takes full and square causal blocks only, not {band}: use torch_flash or flash4")


def _flash_mask(band: Band, num_queries: int, num_keys: int) -> tuple[bool, dict[str, int]]:
    """The band as flash-attention's (causal, window sizes); -1 leaves a side open."""
    if band.is_full:
        return False, {}
    if band.is_causal and num_queries == num_keys:
        return True, {}
    left, right = band.window(num_queries, num_keys)
    return False, {
        "window_size_left": -1 if left is None else left,
        "window_size_right": -1 if right is None else right,
    }
