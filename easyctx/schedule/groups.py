"""A schedule over groups of key/value heads, one after the other: what it allocates shrinks by their number."""

from collections.abc import Iterator

import torch

from easyctx.kernel import Gradients, Saved, exact_dtype
from easyctx.schedule.base import Attention, Schedule


def forward_in_groups(
    schedule: Schedule | None,
    groups: int,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    call: Attention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out_BSHD` and `lse_BHS` of all heads; out in the dtype of q where there are several groups."""
    assert schedule is not None
    if groups == 1:
        return schedule.forward(q_BSHD, k_BSKD, v_BSKD, call)
    dtype = exact_dtype(q_BSHD.dtype) if call.unrounded else q_BSHD.dtype
    out_BSHD = torch.empty_like(q_BSHD, dtype=dtype, memory_format=torch.contiguous_format)
    parts = []
    for of_q, of_kv in _heads(groups, q_BSHD, k_BSKD):
        out, lse = schedule.forward(q_BSHD[:, :, of_q], k_BSKD[:, :, of_kv], v_BSKD[:, :, of_kv], call)
        out_BSHD[:, :, of_q] = out
        parts.append(lse)
    return out_BSHD, torch.cat(parts, dim=1)


def backward_in_groups(
    schedule: Schedule | None, groups: int, dout_BSHD: torch.Tensor, saved: Saved, call: Attention
) -> Gradients:
    """dq, dk and dv of all heads; in the dtypes of q, k and v where there are several groups."""
    assert schedule is not None
    if groups == 1:
        return schedule.backward(dout_BSHD, saved, call)
    q, k, v, out, lse = saved
    whole = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for of_q, of_kv in _heads(groups, q, k):
        part = Saved(q[:, :, of_q], k[:, :, of_kv], v[:, :, of_kv], out[:, :, of_q], lse[:, of_q])
        found = schedule.backward(dout_BSHD[:, :, of_q], part, call)
        for total, heads, gradient in zip(whole, (of_q, of_kv, of_kv), found, strict=True):
            total[:, :, heads] = gradient
    dq, dk, dv = whole
    return dq, dk, dv


def check_head_groups(groups: int, kv_heads: int, ulysses: int = 1) -> None:
    """ValueError unless the key/value heads can be cut into so many groups, each still shared out by Ulysses."""
    valid = [g for g in range(1, kv_heads + 1) if kv_heads % g == 0 and (g == 1 or kv_heads // g % ulysses == 0)]
    if groups not in valid:
        among = f" that {ulysses} Ulysses ranks share" if ulysses > 1 else ""
        raise ValueError(
            f"--head-groups {groups} does not fit {kv_heads} key/value heads{among}: use one of "
            f"{', '.join(map(str, valid))}"
        )


def _heads(groups: int, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The query and key/value heads of each group."""
    of_q, of_kv = q_BSHD.shape[2] // groups, k_BSKD.shape[2] // groups
    for g in range(groups):
        yield slice(g * of_q, (g + 1) * of_q), slice(g * of_kv, (g + 1) * of_kv)
