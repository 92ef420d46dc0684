"""The attention that benchmarks/attention.py times, each as a forward and a backward of this rank's tokens.

Here are easyctx's modes and the local kernels alone; other packages are in rivals.py.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from attention_parts.cases import Case
from easyctx.band import CAUSAL
from easyctx.functional import seq_parallel_attn_func
from easyctx.kernel import KERNELS, Saved, Score
from easyctx.layout import CONTIGUOUS, Layout
from easyctx.modes import MODES

LOCAL = "local kernel"
Tensors = tuple[torch.Tensor, ...]
State = tuple[torch.Tensor, Any]  # out `[1, tokens, H, D]` and what the backward needs


@dataclass(frozen=True)
class Method:
    """layout: which tokens each rank holds. context: held open around all calls."""

    name: str
    kernel: str
    layout: Layout
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], State]
    backward: Callable[[State, torch.Tensor], Tensors]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def differentiable(
    name: str,
    kernel: str,
    layout: Layout,
    attention: Callable[..., torch.Tensor],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Method:
    """A method made of `attention(q, k, v) -> out` and autograd."""

    def forward(*qkv: torch.Tensor) -> State:
        leaves = tuple(t.detach().requires_grad_() for t in qkv)
        return attention(*leaves), leaves

    def backward(state: State, dout: torch.Tensor) -> Tensors:
        out, leaves = state
        return torch.autograd.grad(out, leaves, dout)

    return Method(name, kernel, layout, forward, backward, context)


def own_mode(mode: str, kernel: str, case: Case, ring_degree: int) -> Method:
    """One of easyctx's modes, as its users call it."""
    degree = ring_degree if MODES[mode].over == "both" else None
    window = (-1, -1) if case.mask.window is None else (case.mask.window - 1, 0)
    settings = dict(window_size=window, documents=case.mask.documents, ring_degree=degree, kernel=kernel)

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        out = seq_parallel_attn_func(mode, *qkv, **settings)
        assert isinstance(out, torch.Tensor)
        return out

    return differentiable(mode, kernel, MODES[mode].shard_layout(case.ranks, degree), attention)


def local_kernel(kernel: str) -> Method:
    """A kernel by itself, causal, on one device: as its library gives it, with gradients rounded as there."""
    # Not through these kernels' own backward, which does more, for the sake of partial results.
    alone = {"flash4": _flash4, "flex": lambda q, k, v: KERNELS["flex"].forward(q, k, v, CAUSAL, _score(q))[0]}
    if kernel in alone:
        return differentiable(LOCAL, kernel, CONTIGUOUS, alone[kernel])
    library = KERNELS[kernel]

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        out, lse = library.forward(q, k, v, CAUSAL, _score(q))
        return out, Saved(q, k, v, out.to(q.dtype), lse)

    def backward(state: State, dout: torch.Tensor) -> Tensors:
        return library.backward(dout, state[1], CAUSAL, _score(dout))

    return Method(LOCAL, kernel, CONTIGUOUS, forward, backward)


def _score(q: torch.Tensor) -> Score:
    return Score(q.shape[-1] ** -0.5)


def _flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    result = flash_attn_func(q, k, v, causal=True)
    return result[0] if isinstance(result, tuple) else result
