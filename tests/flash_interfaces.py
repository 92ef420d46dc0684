"""The private functions of flash-attn-3 by their own names and parameters, in both forms, computed in PyTorch.

Those of flash-attn 2 are in benchmarks/attention_parts/flash_attn_stand_in.py. Parameters as in flash-attention's
repository: `hopper/flash_attn_interface.py` at c082294e (until the end of 2025) and at 01afd16d (since then).
"""

from types import SimpleNamespace
from typing import Any

import torch

from easyctx.kernel import Saved, Score


def stand_in() -> Any:
    from attention_parts import flash_attn_stand_in

    return flash_attn_stand_in


def compute(q, k, v, lengths, scale, causal, window, softcap):
    lengths = None if lengths[0] is None else lengths
    return stand_in()._forward(q, k, v, lengths, Score(scale, softcap or None), causal, window)


def differentiate(dout, saved, lengths, gradients, scale, causal, window, softcap) -> None:
    lengths = None if lengths[0] is None else lengths
    score = Score(scale, softcap or None)
    stand_in()._fill(gradients, stand_in()._backward(dout, saved, lengths, score, causal, window))


def _older_forward(
    q,
    k,
    v,
    k_new,
    v_new,
    qv,
    out,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    max_seqlen_q,
    max_seqlen_k,
    page_table,
    kv_batch_idx,
    leftpad_k,
    rotary_cos,
    rotary_sin,
    seqlens_rotary,
    q_descale,
    k_descale,
    v_descale,
    softmax_scale,
    causal,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
):
    unused = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
    assert all(t is None for t in (*unused, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale))
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = compute(q, k, v, lengths, softmax_scale, causal, window_size, softcap)
    return out, lse, None, None


def _older_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q,
    cu_seqlens_k,
    sequed_q,
    sequed_k,
    max_seqlen_q,
    max_seqlen_k,
    dq,
    dk,
    dv,
    softmax_scale,
    causal,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    assert sequed_q is None
    assert sequed_k is None
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    saved = Saved(q, k, v, out, softmax_lse)
    differentiate(dout, saved, lengths, (dq, dk, dv), softmax_scale, causal, window_size, softcap)
    return dq, dk, dv, None


def _newer_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    out_: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    kv_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    seqlens_rotary: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    window = (window_size_left, window_size_right)
    out, lse = compute(q, k, v, lengths, softmax_scale, causal, window, softcap)
    return out, lse, torch.tensor([]), torch.tensor([])


def _newer_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    sequed_q: torch.Tensor | None = None,
    sequed_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> torch.Tensor:
    lengths, window = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    saved = Saved(q, k, v, out, softmax_lse)
    differentiate(dout, saved, lengths, (dq, dk, dv), softmax_scale, is_causal, window, softcap)
    return torch.zeros(1)


def as_operators() -> SimpleNamespace:
    """The newer form behind `torch.library.custom_op`, as it comes."""
    name = "easyctx_tests_flash3"
    forward = torch.library.custom_op(f"{name}::forward", mutates_args=())(_newer_forward)
    backward = torch.library.custom_op(f"{name}::backward", mutates_args=("dq", "dk", "dv"))(_newer_backward)
    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


OLDER = SimpleNamespace(_flash_attn_forward=_older_forward, _flash_attn_backward=_older_backward)
NEWER = SimpleNamespace(_flash_attn_forward=_newer_forward, _flash_attn_backward=_newer_backward)
