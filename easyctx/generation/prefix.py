"""Attention to keys that are spread over ranks, for queries that go to the keys and not the other way round.

A chunk of a prompt, and still more the one token of a decoding step, is far shorter than what came before it. So
queries are sent to every rank, each attends to the keys that it holds, and the partial outputs are merged by their
log-sum-exps. Exact as a ring is, and what is sent does not grow with the number of keys.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from easyctx.band import FULL, Block
from easyctx.kernel import KERNELS, Kernel, Workload, exact_dtype
from easyctx.kernel.merge import Accumulator
from easyctx.layout import Run, run_block, within
from easyctx.mesh import Axis
from easyctx.schedule import Attention

logger = logging.getLogger(__name__)

FEW_QUERIES = 64
FEW_KEYS = 64
PIECE = 2048  # keys
_SPLITTING = KERNELS["torch_flash"]  # with few queries, it shares out the keys
_TAKE_FEW_KEYS = ("torch_flash", "tiled", "reference")  # on a GPU


@dataclass(frozen=True)
class KeptAttention(Attention):
    """An attention call over kept keys.

    forced: `kernel` was named by the user. No other takes its place, but for what it cannot do, and that is said.
    """

    forced: bool = False


@dataclass(frozen=True)
class Keys:
    """Keys and values `[1, n, K, D]` that this rank holds, and their global positions, ascending."""

    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor
    runs: tuple[Run, ...]


def count_before(runs: Sequence[Run], stop: int) -> int:
    """How many of the positions in `runs` are smaller than `stop`."""
    return sum(run.count for _, run in within(runs, 0, stop))


def visible_blocks(runs: Sequence[Run], stop: int, queries: Run, window: int | None) -> Iterator[Block]:
    """The blocks between queries and the keys at positions before `stop`, all of which precede the queries.

    Without a window that is one unmasked block. With one, query and key runs need the same step; queries that have
    another are taken one by one.
    """
    if window is None:
        if seen := count_before(runs, stop):
            yield Block(slice(0, queries.count), slice(0, seen), FULL)
        return
    for offset, run in within(runs, 0, stop):
        for at, query in enumerate(_in_step(queries, run.step)):
            block = run_block(query, run, window)
            if block is not None:
                yield block.shifted(at, offset)


def _in_step(queries: Run, step: int) -> list[Run]:
    if queries.step == step:
        return [queries]
    positions = range(queries.start, queries.start + queries.count * queries.step, queries.step)
    return [Run(position, 1, step) for position in positions]


def attend(
    total: Accumulator,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    blocks: Iterable[Block],
    call: KeptAttention,
) -> None:
    """Fold the attention over these blocks into `total`."""
    for block in blocks:
        q, k, v = q_BSHD[:, block.q], k_BSKD[:, block.k], v_BSKD[:, block.k]
        if block.band.is_full and q.shape[1] <= FEW_QUERIES:
            total.add(*_attend_few(q, k, v, call), block.q)
        else:
            total.add(*_kernel(call, k).forward(q, k, v, block.band, call.score), block.q)


def _kernel(call: KeptAttention, k_BSKD: torch.Tensor) -> Kernel:
    """The call's kernel; for blocks of very few keys, which not every GPU library takes, the tiled one."""
    if not k_BSKD.is_cuda or k_BSKD.shape[1] >= FEW_KEYS:
        return call.kernel
    if call.forced:
        if call.kernel.name in _TAKE_FEW_KEYS:
            return call.kernel
        _say_few_keys(call.kernel.name)
    return KERNELS["tiled"]


@cache
def _say_few_keys(name: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning("easyctx: blocks of fewer than %d keys go to the tiled kernel instead of %s", FEW_KEYS, name)


def attend_sharded(
    q_BSHD: torch.Tensor, queries: Sequence[tuple[slice, Run, int]], keys: Sequence[Keys], call: KeptAttention
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's partial of the queries over its own keys: out `[1, n, H, D]`, lse `[1, H, n]` (-inf for no key).

    Args:
        queries: (where in q, their positions, before which position keys are seen), for all of q.
        keys: each attended to by all of them.
    """
    total = Accumulator(q_BSHD)
    window = call.mask.window
    for part in keys:
        for where, positions, stop in _joined(queries) if window is None else queries:
            blocks = visible_blocks(part.runs, stop, positions, window)
            moved = (block.shifted(where.start, 0) for block in blocks)
            attend(total, q_BSHD, part.k_BSKD, part.v_BSKD, moved, call)
    if total.out_BSHD is None:
        exact = exact_dtype(q_BSHD.dtype)
        lse = q_BSHD.new_full((1, q_BSHD.shape[2], q_BSHD.shape[1]), float("-inf"), dtype=exact)
        return torch.zeros_like(q_BSHD, dtype=exact), lse
    return total.result()


def _attend_few(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: KeptAttention
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few queries over any number of keys, unmasked.

    Kernels share out queries and heads to a GPU's processors, of which a few queries leave most idle. So the query
    heads of one key head are made queries, each key is then read once, and the keys are shared out: by
    FlashAttention-2, which does that by itself, or as a batch of pieces, as for any other kernel that was forced.
    """
    num_queries, kv_heads = q_BSHD.shape[1], k_BSKD.shape[2]
    q = q_BSHD.unflatten(2, (kv_heads, -1)).transpose(2, 3).flatten(1, 2)  # [1, n * H/K, K, D]
    work = Workload(q.device, q.dtype, q.shape[-1], softcapped=call.score.softcap is not None)
    may_split = not call.forced or call.kernel is _SPLITTING
    if may_split and _SPLITTING.refuses(work) is None:
        out, lse = _SPLITTING.forward(q, k_BSKD, v_BSKD, FULL, call.score)
    else:
        out, lse = _attend_in_pieces(q, k_BSKD, v_BSKD, call)
    out = out.unflatten(1, (num_queries, -1)).transpose(2, 3).flatten(2, 3)
    return out, lse.unflatten(2, (num_queries, -1)).transpose(2, 3).flatten(1, 2)


def _attend_in_pieces(
    q: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: KeptAttention
) -> tuple[torch.Tensor, torch.Tensor]:
    """q `[1, n, K, D]` over pieces of the keys, and what is left over of them."""
    pieces = max(k_BSKD.shape[1] // PIECE, 1)
    whole = k_BSKD.shape[1] // pieces * pieces
    total = Accumulator(q)
    k, v = (t[0, :whole].unflatten(0, (pieces, -1)) for t in (k_BSKD, v_BSKD))
    # Copies, since not every library takes a batch of one tensor; they are small.
    of_each = q.expand(pieces, -1, -1, -1).contiguous()
    total.add(*_merge(*_kernel(call, k).forward(of_each, k, v, FULL, call.score)))
    if whole < k_BSKD.shape[1]:
        rest = k_BSKD[:, whole:], v_BSKD[:, whole:]
        total.add(*_kernel(call, rest[0]).forward(q, *rest, FULL, call.score))
    return total.result()


def _joined(queries: Sequence[tuple[slice, Run, int]]) -> Iterator[tuple[slice, Run, int]]:
    """Neighbours that see the same keys as one; without a window their own positions do not matter."""
    waiting: tuple[slice, Run, int] | None = None
    for where, run, stop in queries:
        if waiting is not None and waiting[2] == stop:
            joined = slice(waiting[0].start, where.stop)
            waiting = (joined, Run(waiting[1].start, joined.stop - joined.start), stop)
            continue
        if waiting is not None:
            yield waiting
        waiting = (where, run, stop)
    if waiting is not None:
        yield waiting


def _trade(axis: Axis, send: torch.Tensor) -> torch.Tensor:
    """The r-th slice of dim 0 goes to rank r; the r-th slice of the result came from it."""
    return axis.transport.all_to_all(send)()


def gather_queries(axis: Axis, q_BSHD: torch.Tensor) -> torch.Tensor:
    """Every rank's queries behind each other in rank order: `[1, P * n, H, D]`."""
    if axis.size == 1:
        return q_BSHD
    return _trade(axis, q_BSHD.expand(axis.size, -1, -1, -1)).flatten(0, 1).unsqueeze(0)


def merge_for_owners(axis: Axis, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The partials of gathered queries, back to the ranks that they came from, merged over the ranks' keys.

    `out` is to be of one dtype on all ranks, as a message has one size.
    """
    if axis.size == 1:
        return out_BSHD, lse_BHS
    outs = _trade(axis, out_BSHD[0].unflatten(0, (axis.size, -1)))
    lses = _trade(axis, lse_BHS[0].unflatten(1, (axis.size, -1)).transpose(0, 1))
    return _merge(outs, lses)


def merge_for_all(axis: Axis, out_BSHD: torch.Tensor, lse_BHS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The partials of queries that all ranks have alike, merged over the ranks' keys, on every rank."""
    if axis.size == 1:
        return out_BSHD, lse_BHS
    # What a kernel gave in half precision is float32 on a rank that has several partials, or none.
    outs = _trade(axis, out_BSHD.to(lse_BHS.dtype).expand(axis.size, -1, -1, -1))
    lses = _trade(axis, lse_BHS.expand(axis.size, -1, -1))
    return _merge(outs, lses)


def _merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[P, n, H, D]` and lse `[P, H, n]` of P ranks -> `[1, n, H, D]`, `[1, H, n]`; -inf lies where no rank has
    a key."""
    lse = lses.logsumexp(0, keepdim=True)
    weights = (lses - lse).exp().nan_to_num_(nan=0.0)
    out = (outs.to(lse.dtype) * weights.transpose(1, 2).unsqueeze(-1)).sum(0, keepdim=True)
    return out, lse
