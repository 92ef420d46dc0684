"""Distributed attention as functions of q, k and v, for models that are patched by hand.

    from easyctx.functional import zigzag_ring_attn_func
    out = zigzag_ring_attn_func(q, k, v, window_size=(4095, 0), group=group)

There is one for each sequence-parallel mode: `ring_attn_func`, `zigzag_ring_attn_func`, `striped_attn_func`,
`dist_flash_attn_func`, `ulysses_attn_func`, `usp_attn_func`. Every rank gives its own tokens, in the order in which
`easyctx.prepare_seq_parallel_inputs` deals them out, and gets its own tokens' output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from easyctx.attention import Context, register_context, register_documents, seq_parallel_attention
from easyctx.documents import Documents
from easyctx.mask import Mask
from easyctx.mesh import mesh_of_group
from easyctx.modes import check_mode, get_mode

__all__ = [
    "dist_flash_attn_func",
    "ring_attn_func",
    "seq_parallel_attn_func",
    "striped_attn_func",
    "ulysses_attn_func",
    "usp_attn_func",
    "zigzag_ring_attn_func",
]


def seq_parallel_attn_func(
    seq_algo: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    documents: Documents | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    ring_degree: int | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact causal attention of this rank's queries over the keys of the whole sequence; differentiable.

    Args:
        seq_algo: a sequence-parallel mode of `easyctx.modes.MODES`.
        q: `[B, S/P, H, D]`; k, v: `[B, S/P, K, D]` with K dividing H; of one dtype.
        causal: must be True.
        window_size: (left, right) as flash-attention counts them: a query sees `left` positions before its own
            (-1: all of them); right is 0 or -1.
        softmax_scale: factor on the scores, by default D ** -0.5.
        softcap: c > 0 makes scores c * tanh(score / c).
        sinks: `[H]`, for each head one more score that has no value (gpt-oss).
        documents, cu_seqlens: borders in the whole sequence, padding included, that attention does not cross;
            cu_seqlens are the cumulated lengths 0, n1, n1 + n2, …, S, the same for all rows of the batch.
        group: the ranks that share the sequence (default: all processes).
        ring_degree: of `usp_attn`: so many ranks form the ring; neighbours in the group are of one Ulysses group.
        kernel: one of `easyctx.kernel.KERNEL_CHOICES`.
        return_lse: also return the log-sum-exp, `[B, H, S/P]` float32 (float64 for float64), without gradient.

    Returns:
        `[B, S/P, H, D]` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes, head counts, lengths, windows or borders that do not fit each other or the
            ranks, with both numbers and the way out.
    """
    _check_tensors(q, k, v, sinks)
    if not causal:
        raise ValueError("causal=False was given, and sequence parallelism here is causal: encoders are not computed")
    mode = get_mode(seq_algo)
    mesh = mesh_of_group(group, ring_degree if mode.over == "both" else None)
    check_mode(seq_algo, None, mesh.sp_size, ring_degree)
    mode.check_heads(q.shape[2], k.shape[2], mesh.sp_size, ring_degree)
    length = q.shape[1] * mesh.sp_size
    if cu_seqlens is not None:
        documents = Documents.from_cu_seqlens(cu_seqlens, length)
    if documents is not None:
        documents.check_fits(q.shape[0], length)
    mask = Mask(_window(window_size), documents).within(length)
    out, lse = seq_parallel_attention(
        q,
        k,
        v,
        sinks,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap,
        mask.window or 0,
        register_documents(mask.documents),
        register_context(Context(mode, mesh, kernel)),
    )
    return (out, lse) if return_lse else out


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Raises ValueError naming the first thing in which they do not fit each other, and both values."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention got mixed dtypes: q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one")
    shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{shapes}: give each as [batch, tokens, heads, head dim]")
    for dim, name in enumerate(("batch", "tokens", "heads", "head dim")):
        for other, tensor in (("q", q), ("v", v)):
            if (other, name) != ("q", "heads") and tensor.shape[dim] != k.shape[dim]:
                raise ValueError(
                    f"{shapes}: {name} of {other} {tensor.shape[dim]}, of k {k.shape[dim]}; only q's heads may differ"
                )
    heads, kv_heads = q.shape[2], k.shape[2]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads ({shapes})")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, and q {heads} heads: give one number a head")


def _window(window_size: tuple[int, int]) -> int | None:
    left, right = window_size
    if right not in (0, -1):
        raise ValueError(f"window_size is {window_size}, and a causal query sees nothing behind it: ({left}, 0)")
    return None if left < 0 else left + 1


def _of_mode(name: str) -> Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return seq_parallel_attn_func(name, q, k, v, **settings)

    attention.__name__ = attention.__qualname__ = f"{name}_func"
    attention.__doc__ = f"`seq_parallel_attn_func` in mode {name!r}, with its arguments: {get_mode(name).summary}."
    return attention


ring_attn_func = _of_mode("ring_attn")
zigzag_ring_attn_func = _of_mode("zigzag_ring_attn")
striped_attn_func = _of_mode("striped_attn")
dist_flash_attn_func = _of_mode("dist_flash_attn")
ulysses_attn_func = _of_mode("ulysses_attn")
usp_attn_func = _of_mode("usp_attn")
