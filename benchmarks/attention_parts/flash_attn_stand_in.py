"""For benchmarks only: flash-attn 2's functions by its own names, over the copy of it in PyTorch's CUDA build.

ring-flash-attn and yunchang are written against `flash_attn.flash_attn_interface`, a package that is rarely installed
today. The kernels are the same; one more copy of dq, dk and dv a block, since PyTorch's op does not write into buffers
that it is given, is the difference (about 1% at 8K tokens, less beyond). Without a GPU the blocks are easyctx's tiled
kernel's, so that the way there can be tested.
"""

import importlib.util
import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from easyctx.band import Band
from easyctx.kernel import KERNELS, Saved, Score, exact_dtype
from easyctx.kernel.torch_cuda import flash_backward, flash_forward

INTERFACE = "flash_attn.flash_attn_interface"
Lengths = tuple[torch.Tensor, torch.Tensor, int, int] | None  # cu_seqlens of queries and of keys, and the longest
Window = tuple[int, int]


def install() -> bool:
    """Put the stand-in where `import flash_attn` finds it, unless flash-attn 2 is installed; True if it is needed."""
    if INTERFACE in sys.modules:
        return getattr(sys.modules[INTERFACE], "is_stand_in", False)
    try:
        if importlib.util.find_spec(INTERFACE) is not None:
            return False
    except ModuleNotFoundError:
        package: Any = ModuleType("flash_attn")
        package.__path__, package.__spec__ = [], ModuleSpec("flash_attn", None)
        sys.modules["flash_attn"] = package
    # With flash-attn-4 there is a package of that name, which stays as it is but for these three names.
    package = importlib.import_module("flash_attn")
    interface: Any = ModuleType(INTERFACE)
    interface.is_stand_in = True
    dense, varlen = (
        (_flash_attn_forward, _flash_attn_backward),
        (_flash_attn_varlen_forward, _flash_attn_varlen_backward),
    )
    for function in (*dense, *varlen, flash_attn_func):
        setattr(interface, function.__name__, function)
    package.flash_attn_interface, package.flash_attn_func = interface, flash_attn_func
    package.__version__ = "2.8.3"
    sys.modules[INTERFACE] = interface
    return True


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: None = None,
    return_softmax: bool = False,
) -> tuple[Any, ...]:
    assert not dropout_p
    score = _score(softmax_scale, softcap)
    out, lse = _forward(q, k, v, None, score, causal, (window_size_left, window_size_right))
    return out, lse, None, None


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    rng_state: None = None,
) -> None:
    saved, window = Saved(q, k, v, out, softmax_lse), (window_size_left, window_size_right)
    _fill((dq, dk, dv), _backward(dout, saved, None, _score(softmax_scale, softcap), causal, window))


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: None = None,
    return_softmax: bool = False,
) -> tuple[Any, ...]:
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    score = _score(softmax_scale, softcap)
    out, lse = _forward(q, k, v, lengths, score, causal, (window_size_left, window_size_right))
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    rng_state: None = None,
) -> None:
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    saved, window = Saved(q, k, v, out, softmax_lse), (window_size_left, window_size_right)
    _fill((dq, dk, dv), _backward(dout, saved, lengths, _score(softmax_scale, softcap), causal, window))


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, score: Score, causal: bool, window: Window) -> torch.Tensor:
        out, lse = _forward(q, k, v, None, score, causal, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = (None, score, causal, window)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        gradients = _backward(grads[0], Saved(*ctx.saved_tensors), *ctx.settings)
        return *(g.to(t.dtype) for g, t in zip(gradients, ctx.saved_tensors, strict=False)), None, None, None


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    assert not dropout_p
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _FlashAttention.apply(q, k, v, _score(scale, softcap), causal, tuple(window_size))


def _score(scale: float, softcap: float) -> Score:
    return Score(scale, softcap or None)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, score: Score, causal: bool, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse; q, k and v without a batch dim where there are `lengths`."""
    if q.device.type == "cuda":
        assert score.softcap is None
        return flash_forward(q, k, v, *_on_gpu(q, k, lengths, causal, window), score)
    if lengths is None:
        out, lse = KERNELS["tiled"].forward(q, k, v, _band(q.shape[1], k.shape[1], causal, window), score)
        return out.to(q.dtype), lse
    parts = [
        KERNELS["tiled"].forward(q[None, a], k[None, b], v[None, b], band, score)
        for a, b, band in _documents(lengths, causal, window)
    ]
    return torch.cat([out[0] for out, _ in parts]).to(q.dtype), torch.cat([lse[0] for _, lse in parts], dim=1)


def _backward(
    dout: torch.Tensor, saved: Saved, lengths: Lengths, score: Score, causal: bool, window: Window
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, out, lse = saved
    if q.device.type == "cuda":
        return flash_backward(dout, saved, *_on_gpu(q, k, lengths, causal, window), score)
    if lengths is None:
        return KERNELS["tiled"].backward(dout, saved, _band(q.shape[1], k.shape[1], causal, window), score)
    gradients = tuple(torch.zeros_like(t, dtype=exact_dtype(t.dtype)) for t in (q, k, v))
    for a, b, band in _documents(lengths, causal, window):
        part = Saved(q[None, a], k[None, b], v[None, b], out[None, a], lse[None, :, a])
        parts = KERNELS["tiled"].backward(dout[None, a], part, band, score)
        for gradient, stretch, new in zip(gradients, (a, b, b), parts, strict=True):
            gradient[stretch] = new[0]
    return gradients


def _fill(buffers: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]) -> None:
    for buffer, gradient in zip(buffers, gradients, strict=True):
        buffer.copy_(gradient)


def _on_gpu(
    q: torch.Tensor, k: torch.Tensor, lengths: Lengths, causal: bool, window: Window
) -> tuple[tuple[Any, ...], tuple[bool, dict[str, int]]]:
    """(lengths, mask) as PyTorch's op takes them."""
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    if causal and window != (-1, -1):  # the op takes one or the other
        causal, sides["window_size_right"] = False, 0
    return lengths or (None, None, q.shape[1], k.shape[1]), (causal, {} if window == (-1, -1) else sides)


def _band(num_queries: int, num_keys: int, causal: bool, window: Window) -> Band:
    """flash-attn counts its diagonal from the bottom right corner, and where one side is open takes it for as wide as
    there are keys."""
    lead = num_keys - num_queries
    left, right = (None if side < 0 or side >= num_keys else side for side in window)
    right = 0 if causal else right
    if (left is None) != (right is None):
        left, right = (num_keys if side is None else side for side in (left, right))
    return Band(None if left is None else lead - left, None if right is None else lead + right)


def _documents(lengths: Lengths, causal: bool, window: Window) -> list[tuple[slice, slice, Band]]:
    assert lengths is not None
    stretches = ([slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())] for cu_seqlens in lengths[:2])
    return [(a, b, _band(a.stop - a.start, b.stop - b.start, causal, window)) for a, b in zip(*stretches, strict=True)]
