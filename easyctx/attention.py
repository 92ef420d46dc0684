"""Distributed attention as one PyTorch operator with a registered backward.

One opaque operator (rather than an autograd.Function) so that its result can be kept while a layer around it is
computed again (`easyctx.memory.recall`), and so that torch.compile sees a single node. Operators take plain values, so
what is no tensor (mesh, layout, schedule, kernel; the documents of a batch) is looked up by a number.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from easyctx.backend import OWN, third_party_attention
from easyctx.documents import Documents
from easyctx.kernel import Saved, Score, Workload, exact_dtype, get_kernel
from easyctx.mask import Mask
from easyctx.memory.recall import current_keeper
from easyctx.mesh import Mesh
from easyctx.modes import Mode
from easyctx.schedule import Attention
from easyctx.schedule.groups import backward_in_groups, forward_in_groups


@dataclass(frozen=True, eq=False)
class Context:
    """All that the attention of one patched model needs beside its tensors."""

    mode: Mode
    mesh: Mesh
    kernel: str = "auto"
    backend: str = OWN
    head_groups: int = 1  # of key/value heads, computed one after the other


_contexts: list[Context] = []
# The newest only: a batch is over long before as many others came.
_documents: OrderedDict[int, Documents] = OrderedDict()
MOST_DOCUMENTS = 4096
NO_DOCUMENTS = 0


def register_context(context: Context) -> int:
    """The number under which `seq_parallel_attention` finds this context; contexts live as long as the process."""
    for number, known in enumerate(_contexts):
        if vars(known) == vars(context):
            return number
    _contexts.append(context)
    return len(_contexts) - 1


def register_documents(documents: Documents | None) -> int:
    """The number under which `seq_parallel_attention` finds these documents, for as long as they are of use."""
    if documents is None or documents.is_plain:
        return NO_DOCUMENTS
    newest = next(reversed(_documents), NO_DOCUMENTS)
    if newest and _documents[newest] == documents:
        return newest
    _documents[newest + 1] = documents
    if len(_documents) > MOST_DOCUMENTS:
        _documents.popitem(last=False)
    return newest + 1


def _call(
    number: int,
    q_BSHD: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
    documents: int,
    *,
    unrounded: bool = False,
) -> tuple[Context, Attention]:
    context = _contexts[number]
    work = Workload(q_BSHD.device, q_BSHD.dtype, q_BSHD.shape[-1], window > 0, softcap > 0, packed=documents > 0)
    ring, ulysses = context.mode.axes(context.mesh)
    return context, Attention(
        context.mode.layout,
        get_kernel(context.kernel, work),
        Score(scale, softcap or None),
        Mask(window or None, _documents[documents] if documents else None),
        ring,
        ulysses,
        unrounded,
    )


def attend(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    sinks_H: torch.Tensor | None,
    *numbers: Any,
) -> torch.Tensor:
    """`seq_parallel_attention`'s out, with its arguments; through the third-party package that the context names."""
    context = _contexts[numbers[-1]]
    if context.backend == OWN:
        return seq_parallel_attention(q_BSHD, k_BSKD, v_BSKD, sinks_H, *numbers)[0]
    scale, softcap, window, documents, _ = numbers
    return third_party_attention(
        context.backend,
        context.mode.name,
        context.mesh,
        q_BSHD,
        k_BSKD,
        v_BSKD,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks_H=sinks_H,
        documents=_documents[documents] if documents else None,
    )


@torch.library.custom_op("easyctx::seq_parallel_attention", mutates_args=())
def seq_parallel_attention(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    sinks_H: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    documents: int,
    context: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of this rank's queries over the keys of the whole sequence.

    Args:
        q_BSHD: `[B, S/P, H, D]`, this rank's tokens in the layout's order; k, v with K heads, H a multiple of K.
        sinks_H: `[H]`, a score that every query of a head has besides those of its keys, for no value at all
            (gpt-oss); or None.
        scale: factor on the scores.
        softcap: bound c on the scores, c * tanh(score / c) (Gemma 2); 0 for none.
        window: a query sees itself and the `window - 1` positions before it; 0 for no window.
        documents: number from `register_documents`, borders that attention does not cross.
        context: number from `register_context`.

    Returns:
        out `[B, S/P, H, D]` in the dtype of q, and the log-sum-exp `[B, H, S/P]` (float32; float64 for float64),
        with the sinks, which carries no gradient.
    """
    keeper = current_keeper()
    if keeper is not None and (known := keeper.recall()) is not None:
        return known
    found, call = _call(context, q_BSHD, scale, softcap, window, documents, unrounded=sinks_H is not None)
    out, lse = forward_in_groups(found.mode.schedule, found.head_groups, q_BSHD, k_BSKD, v_BSKD, call)
    if sinks_H is not None:
        out, lse = add_sinks(out, lse, sinks_H)
    result = out.to(q_BSHD.dtype).contiguous(), lse.contiguous()
    if keeper is not None:
        keeper.keep(result)
    return result


@seq_parallel_attention.register_fake
def _(q_BSHD, k_BSKD, v_BSKD, sinks_H, scale, softcap, window, documents, context):  # type: ignore[no-untyped-def]
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
    sinks_H: torch.Tensor | None,
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
    documents: int,
    context: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv and dsinks (of this rank's queries; empty without sinks) of `seq_parallel_attention`."""
    found, call = _call(context, q_BSHD, scale, softcap, window, documents)
    # A sink takes part through the log-sum-exp alone: the probabilities of the keys come out smaller by its share.
    saved = Saved(q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS)
    dq, dk, dv = backward_in_groups(found.mode.schedule, found.head_groups, dout_BSHD, saved, call)
    dsinks = q_BSHD.new_empty(0) if sinks_H is None else _sinks_gradient(dout_BSHD, out_BSHD, lse_BHS, sinks_H)
    return _own(dq, q_BSHD), _own(dk, k_BSKD), _own(dv, v_BSKD), dsinks


def _own(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In the dtype of `like` and in memory of its own: an operator's outputs may not share any, as dk and dv may."""
    is_whole = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
    if is_whole and gradient.dtype == like.dtype and gradient.is_contiguous():
        return gradient
    return gradient.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


@seq_parallel_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dout_BSHD, q_BSHD, k_BSKD, v_BSKD, sinks_H, out_BSHD, lse_BHS, scale, softcap, window, documents, context
):
    dsinks = q_BSHD.new_empty(0) if sinks_H is None else torch.empty_like(sinks_H)
    grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_BSHD, k_BSKD, v_BSKD))
    return *grads, dsinks


def add_sinks(
    out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, sinks_H: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sinks' share of every softmax, which goes to no value: exact from the merged log-sum-exp."""
    with_sinks = torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[None, :, None])
    keep = (lse_BHS - with_sinks).exp().transpose(1, 2).unsqueeze(-1)
    return out_BSHD.to(lse_BHS.dtype) * keep, with_sinks


def _sinks_gradient(
    dout_BSHD: torch.Tensor, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, sinks_H: torch.Tensor
) -> torch.Tensor:
    """dsinks `[H]`: minus probability times (dout . out), as of a key whose value is zero."""
    exact = lse_BHS.dtype
    probability = (sinks_H.to(exact)[None, :, None] - lse_BHS).exp()
    delta_BHS = (dout_BSHD.to(exact) * out_BSHD.to(exact)).sum(-1).transpose(1, 2)
    return -(probability * delta_BHS).sum((0, 2)).to(sinks_H.dtype)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, sinks, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, sinks, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dout, _dlse):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: a checkpointed layer runs again for it
    dq, dk, dv, dsinks = seq_parallel_attention_backward(dout, *saved, *ctx.numbers)
    return dq, dk, dv, dsinks if saved[3] is not None else None, *(None for _ in ctx.numbers)


seq_parallel_attention.register_autograd(_backward, setup_context=_setup_context)
