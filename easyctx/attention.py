"""Distributed attention as one PyTorch operator with a registered backward.

One opaque operator (rather than an autograd.Function) so that selective activation checkpointing can name it and
keep its outputs, and so that torch.compile sees a single node. Operators take plain values, so what is no tensor
(mesh, layout, schedule, kernel) is looked up by a number.
"""

from dataclasses import dataclass

import torch

from easyctx.kernel import Saved, Workload, exact_dtype, get_kernel
from easyctx.mesh import Mesh
from easyctx.modes import Mode
from easyctx.schedule import Attention


@dataclass(frozen=True, eq=False)
class Context:
    """All that the attention of one patched model needs beside its tensors."""

    mode: Mode
    mesh: Mesh
    kernel: str = "auto"


_contexts: list[Context] = []


def register_context(context: Context) -> int:
    """The number under which `seq_parallel_attention` finds this context; contexts live as long as the process."""
    for number, known in enumerate(_contexts):
        if (known.mode, known.mesh, known.kernel) == (context.mode, context.mesh, context.kernel):
            return number
    _contexts.append(context)
    return len(_contexts) - 1


def _call(number: int, q_BSHD: torch.Tensor, scale: float, window: int) -> tuple[Context, Attention]:
    context = _contexts[number]
    work = Workload(q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1], windowed=window > 0)
    kernel = get_kernel(context.kernel, work)
    return context, Attention(context.mode.layout, context.mesh, kernel, scale, window or None)


@torch.library.custom_op("easyctx::seq_parallel_attention", mutates_args=())
def seq_parallel_attention(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float, window: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of this rank's queries over the keys of the whole sequence.

    Args:
        q_BSHD: `[B, S/P, H, D]`, this rank's tokens in the layout's order; k, v with K heads, H a multiple of K.
        scale: factor on the scores.
        window: a query sees itself and the `window - 1` positions before it; 0 for no window.
        context: number from `register_context`.

    Returns:
        out `[B, S/P, H, D]` in the dtype of q, and the log-sum-exp `[B, H, S/P]` (float32; float64 for float64),
        which carries no gradient.
    """
    found, call = _call(context, q_BSHD, scale, window)
    assert found.mode.schedule is not None
    out, lse = found.mode.schedule.forward(q_BSHD, k_BSKD, v_BSKD, call)
    return out.contiguous(), lse.contiguous()


@seq_parallel_attention.register_fake
def _(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, scale: float, window: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = q_BSHD.shape
    return torch.empty_like(q_BSHD, memory_format=torch.contiguous_format), q_BSHD.new_empty(
        (batch, heads, length), dtype=exact_dtype(q_BSHD.dtype)
    )


@torch.library.custom_op("easyctx::seq_parallel_attention_backward", mutates_args=())
def seq_parallel_attention_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    scale: float,
    window: int,
    context: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of `seq_parallel_attention`, shaped and typed as q, k, v."""
    found, call = _call(context, q_BSHD, scale, window)
    assert found.mode.schedule is not None
    dq, dk, dv = found.mode.schedule.backward(dout_BSHD, Saved(q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS), call)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@seq_parallel_attention_backward.register_fake
def _(dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS, scale, window, context):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BSHD, k_BSKD, v_BSKD))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale, ctx.window, ctx.number = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dout, _dlse):  # type: ignore[no-untyped-def]
    grads = seq_parallel_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.number)
    return *grads, None, None, None


seq_parallel_attention.register_autograd(_backward, setup_context=_setup_context)
