"""DistFlashAttn (arXiv 2310.03294): contiguous shards, and ranks that run out of keys work for those that have many.

With contiguous shards, causal attention pairs the queries of rank r with the keys of ranks 0 .. r only. At step t every
rank sends one message to rank r + t (mod P) and gets one from rank r - t:

    r - t >= 0   it brings keys, and this rank computes its own queries against them;
    r - t <  0   it brings the queries of rank r - t + P, which have too much to do: this rank computes them against
                 its own keys and sends the result back.

Pairs at distance d = 1 .. P/2 are thus computed where the queries are, those further apart where the keys are. With an
even P the pairs at distance P/2 would be covered twice, so each side takes half of the query rows: every rank does
exactly the same work.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from easyctx.band import Block, clip_rows
from easyctx.kernel import Gradients, Saved, exact_dtype
from easyctx.layout import CONTIGUOUS
from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.exchange import Exchange, pack, packed_size, unpack
from easyctx.schedule.merge import Accumulator

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Step:
    """What this rank does at one distance."""

    distance: int
    gets_keys: bool  # else it gets queries, and helps
    sends_keys: bool  # else it sends queries, and is helped
    blocks: tuple[Block, ...]  # of this rank's work, in the local indices of whose queries they are
    helped_rows: slice  # the query rows that helpers take at this step


@dataclass(frozen=True)
class _Message:
    """A message on its way: what it lands in, and how to read it."""

    exchange: Exchange
    buffer: torch.Tensor
    like: Tensors


class DistFlash(Schedule):
    """Messages of the next step travel while this one is computed; results come home while later ones are."""

    name = "dist_flash"
    layouts = (CONTIGUOUS,)

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = Accumulator(q_BSHD)
        traffic = _Traffic(call, q_BSHD.shape[1])
        keys = (k_BSKD, v_BSKD)
        messages = traffic.messages(keys, lambda rows: (q_BSHD[:, rows],))
        _attend(total, q_BSHD, keys, traffic.own_blocks, call)
        for step, message in messages:
            result = None
            if step.gets_keys:
                _attend(total, q_BSHD, message, step.blocks, call)
            else:
                [queries] = message
                part = Accumulator(queries)
                _attend(part, queries, keys, _from_row(step), call)
                out, lse = part.result()
                result = (lse, out)
            traffic.reply(step, result, None if step.sends_keys else _like_result(q_BSHD[:, step.helped_rows]))
        for step, (lse, out) in traffic.replies():
            total.add(step.helped_rows, out, lse)
        return total.result()

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        q, k, v, out, lse = saved
        exact = lse.dtype
        dq = torch.zeros_like(q, dtype=exact, memory_format=torch.contiguous_format)
        dkv = torch.zeros((2, *k.shape), dtype=exact, device=k.device)
        traffic = _Traffic(call, q.shape[1])
        messages = traffic.messages(
            (k, v), lambda rows: (lse[:, :, rows], q[:, rows], out[:, rows], dout_BSHD[:, rows])
        )
        _differentiate(dq, dkv, dout_BSHD, saved, traffic.own_blocks, call)
        for step, message in messages:
            back = dkv if step.sends_keys else dq[:, step.helped_rows]
            if step.gets_keys:
                part = torch.zeros_like(dkv)
                whose = Saved(q, message[0], message[1], out, lse)
                _differentiate(dq, part, dout_BSHD, whose, step.blocks, call)
            else:
                their_lse, their_q, their_out, their_dout = message
                part = torch.zeros_like(their_q, dtype=exact)
                whose = Saved(their_q, k, v, their_out, their_lse)
                _differentiate(part, dkv, their_dout, whose, _from_row(step), call)
            traffic.reply(step, (part,), (back,))
        for step, (part,) in traffic.replies():
            if step.sends_keys:
                dkv += part
            else:
                dq[:, step.helped_rows] += part
        # An operator's outputs may not share memory.
        return dq.to(q.dtype), dkv[0].to(k.dtype, copy=True), dkv[1].to(k.dtype, copy=True)


def _like_result(q_BSHD: torch.Tensor) -> Tensors:
    """Tensors shaped as the (lse, out) of these queries."""
    batch, length, heads, _ = q_BSHD.shape
    return q_BSHD.new_empty((batch, heads, length), dtype=exact_dtype(q_BSHD.dtype)), q_BSHD


def _attend(
    total: Accumulator,
    q_BSHD: torch.Tensor,
    keys: Tensors,
    blocks: tuple[Block, ...],
    call: Attention,
) -> None:
    k, v = keys
    for block in blocks:
        part = call.kernel.forward(q_BSHD[:, block.q], k[:, block.k], v[:, block.k], block.band, call.scale)
        total.add(block.q, *part)


def _differentiate(
    dq_BSHD: torch.Tensor,
    dkv: torch.Tensor,
    dout_BSHD: torch.Tensor,
    saved: Saved,
    blocks: tuple[Block, ...],
    call: Attention,
) -> None:
    """Add the blocks' gradients to dq and to dkv `[2, B, S, K, D]`."""
    for block in blocks:
        of_block = saved.of_block(block.q, saved.k_BSKD[:, block.k], saved.v_BSKD[:, block.k])
        part_dq, dk, dv = call.kernel.backward(dout_BSHD[:, block.q], of_block, block.band, call.scale)
        dq_BSHD[:, block.q] += part_dq
        dkv[0][:, block.k] += dk
        dkv[1][:, block.k] += dv


def _from_row(step: _Step) -> tuple[Block, ...]:
    """A helper's blocks, counted from the first row that it was sent."""
    return tuple(block.shifted(-step.helped_rows.start, 0) for block in step.blocks)


class _Traffic:
    """The steps of this rank and the messages and replies between them."""

    def __init__(self, call: Attention, local: int) -> None:
        self.call, self.local = call, local
        mesh, layout = call.mesh, call.layout
        self.rank, self.size, self.seq_len = mesh.sp_rank, mesh.sp_size, local * mesh.sp_size
        self.own_blocks = layout.plan(self.seq_len, self.size, self.rank, self.rank, call.window)
        self.steps = [self._step(t) for t in range(1, self.size // 2 + 1) if self._is_needed(t)]
        self._replies: list[tuple[_Step, _Message]] = []
        self._sent: list[Exchange] = []

    def _step(self, distance: int) -> _Step:
        rank, size, local = self.rank, self.size, self.local
        half = local // 2 if 2 * distance == size else None
        gets_keys = rank >= distance
        queries_of = rank if gets_keys else rank - distance + size
        keys_of = rank - distance if gets_keys else rank
        direct_rows, helped_rows = slice(0, local if half is None else half), slice(half or 0, local)
        rows = direct_rows if gets_keys else helped_rows
        plan = self.call.layout.plan(self.seq_len, size, queries_of, keys_of, self.call.window)
        clipped = (clip_rows(block, rows) for block in plan)
        return _Step(
            distance=distance,
            gets_keys=gets_keys,
            sends_keys=rank + distance < size,
            blocks=tuple(block for block in clipped if block is not None),
            helped_rows=helped_rows,
        )

    def _is_needed(self, distance: int) -> bool:
        """Whether any rank has work at this step; a window leaves far steps empty, which are then not sent either."""
        hops = self.call.layout.num_hops(self.seq_len, self.size, self.call.window)
        return min(distance, self.size - distance) <= hops

    def messages(self, keys: Tensors, queries: Callable[[slice], Tensors]) -> Iterator[tuple[_Step, Tensors]]:
        """Iterates over (step, tensors that came); the first message leaves now, later ones a step ahead.

        keys: k and v of this rank. queries: what goes to a helper for given rows.
        """
        first = self._send(self.steps[0], keys, queries) if self.steps else None
        return self._receive(first, keys, queries)

    def _receive(
        self, pending: _Message | None, keys: Tensors, queries: Callable[[slice], Tensors]
    ) -> Iterator[tuple[_Step, Tensors]]:
        following = [*self.steps[1:], None][: len(self.steps)]
        for step, next_step in zip(self.steps, following, strict=True):
            assert pending is not None
            came = pending
            came.exchange.wait()
            pending = self._send(next_step, keys, queries) if next_step is not None else None
            yield step, unpack(came.buffer, came.like)

    def _send(self, step: _Step, keys: Tensors, queries: Callable[[slice], Tensors]) -> _Message:
        helped = queries(step.helped_rows)
        like = keys if step.gets_keys else helped
        payload = pack(keys if step.sends_keys else helped)
        message = _Message(Exchange(self.call.mesh), payload.new_empty(packed_size(like)), like)
        message.exchange.start(payload, message.buffer, hops=step.distance)
        return message

    def reply(self, step: _Step, result: Tensors | None, like: Tensors | None) -> None:
        """Send `result` to whom this step's message came from, and expect tensors like `like` from whom it went to."""
        send = pack(result) if result is not None else None
        receive = like[0].new_empty(packed_size(like), dtype=torch.uint8) if like is not None else None
        exchange = Exchange(self.call.mesh)
        exchange.start(send, receive, hops=-step.distance)
        if receive is not None and like is not None:
            self._replies.append((step, _Message(exchange, receive, like)))
        else:
            self._sent.append(exchange)

    def replies(self) -> Iterator[tuple[_Step, Tensors]]:
        """Iterates over (step, tensors that came back), once all of this rank's work is done."""
        for step, message in self._replies:
            message.exchange.wait()
            yield step, unpack(message.buffer, message.like)
        for exchange in self._sent:
            exchange.wait()
