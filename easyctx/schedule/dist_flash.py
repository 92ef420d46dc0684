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

from easyctx.band import Block, clip_rows, hull
from easyctx.kernel import Gradients, Saved, exact_dtype
from easyctx.layout import CONTIGUOUS
from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.exchange import Exchange, pack, packed_size, some, unpack

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Step:
    """What this rank does at one distance. Keys are sent on as (k, v), queries as what the pass needs of them."""

    distance: int
    gets_keys: bool  # else it gets queries, and helps
    sends_keys: bool  # else it sends queries, and is helped
    gets: slice  # the keys or queries of their owner that come; empty where this rank has nothing to compute
    sends: slice  # the keys or queries of this rank that go
    blocks: tuple[Block, ...]  # of this rank's work; what came is counted from its start
    sent_blocks: tuple[Block, ...]  # of the other rank's work; what went is counted from its start


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
        total = call.output(q_BSHD)
        traffic = _Traffic(call, q_BSHD.shape[1])
        messages = traffic.messages(
            lambda keys: (k_BSKD[:, keys], v_BSKD[:, keys]), lambda queries: (q_BSHD[:, queries],)
        )
        for block in traffic.own_blocks:
            total.add(k_BSKD, v_BSKD, block)
        for step, message in messages:
            result = None
            if step.gets_keys:
                their_k, their_v = message
                for block in step.blocks:
                    total.add(their_k, their_v, block)
            elif step.blocks:
                part = call.output(message[0])
                for block in step.blocks:
                    part.add(k_BSKD, v_BSKD, block)
                out, lse = part.result()
                result = (lse, out.to(q_BSHD.dtype))
            traffic.reply(step, result, None if step.sends_keys else _like_result(q_BSHD[:, step.sends]))
        for step, (lse, out) in traffic.replies():
            total.merge(out, lse, step.sends)
        return total.result()

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        q, k, v, out, lse = saved
        gradients = call.gradients(dout_BSHD, saved)
        traffic = _Traffic(call, q.shape[1])
        own = gradients.new_keys(k, traffic.own_blocks)
        messages = traffic.messages(
            lambda keys: (k[:, keys], v[:, keys]),
            lambda queries: (lse[:, :, queries], q[:, queries], out[:, queries], dout_BSHD[:, queries]),
        )
        for block in traffic.own_blocks:
            gradients.add(k, v, block, own)
        for step, message in messages:
            if step.gets_keys:
                their_k, their_v = message
                of_keys = gradients.new_keys(their_k, step.blocks)
                for block in step.blocks:
                    gradients.add(their_k, their_v, block, of_keys)
                part = of_keys.message
            else:
                their_lse, their_q, their_out, their_dout = message
                theirs = call.gradients(their_dout, Saved(their_q, k, v, their_out, their_lse))
                for block in step.blocks:
                    theirs.add(k, v, block, own)
                part = theirs.dq(unrounded=True)
            back = own.new_message(step.sends, step.sent_blocks) if step.sends_keys else gradients.like(step.sends)
            traffic.reply(step, (part,) if step.blocks else None, (back,))
        for step, (part,) in traffic.replies():
            if step.sends_keys:
                own.add_message(part, step.sends, step.sent_blocks)
            else:
                gradients.add_dq(part, step.sends)
        return gradients.dq(), *own.result()


def _like_result(q_BSHD: torch.Tensor) -> Tensors:
    """Tensors shaped as the (lse, out) of these queries."""
    batch, length, heads, _ = q_BSHD.shape
    return q_BSHD.new_empty((batch, heads, length), dtype=exact_dtype(q_BSHD.dtype)), q_BSHD


class _Traffic:
    """The steps of this rank and the messages and replies between them.

    Every rank goes through the same steps, also where it has nothing to send or to compute (see `direct.py`).
    """

    def __init__(self, call: Attention, local: int) -> None:
        self.call, self.local = call, local
        self.rank, self.size, self.seq_len = call.ring.rank, call.ring.size, local * call.ring.size
        self.own_blocks = call.layout.plan(self.seq_len, self.size, self.rank, self.rank, call.mask)
        hops = set(call.layout.hops(self.seq_len, self.size, call.mask))
        distances = range(1, self.size // 2 + 1)
        self.steps = [self._step(t) for t in distances if t in hops or self.size - t in hops]
        self._replies: list[tuple[_Step, _Message]] = []
        self._sent: list[Exchange] = []

    def _step(self, distance: int) -> _Step:
        gets_keys, gets, blocks = self._work(self.rank, distance)
        sends_keys, sends, sent_blocks = self._work((self.rank + distance) % self.size, distance)
        return _Step(distance, gets_keys, sends_keys, gets, sends, blocks, sent_blocks)

    def _work(self, rank: int, distance: int) -> tuple[bool, slice, tuple[Block, ...]]:
        """Whether `rank` gets keys at a step (else queries), which of them, and the blocks that it computes."""
        # Both sides of a pair at half the ring's size share it: the helper takes the last rows.
        half = self.local // 2 if 2 * distance == self.size else None
        gets_keys = rank >= distance
        if gets_keys:
            queries_of, keys_of, rows = rank, rank - distance, slice(0, self.local if half is None else half)
        else:
            queries_of, keys_of, rows = rank - distance + self.size, rank, slice(half or 0, self.local)
        plan = self.call.layout.plan(self.seq_len, self.size, queries_of, keys_of, self.call.mask)
        clipped = (clip_rows(block, rows) for block in plan)
        blocks = [block for block in clipped if block is not None]
        if gets_keys:
            gets = hull((block.k for block in blocks), self.call.kernel.key_tile)
            return True, gets, tuple(block.shifted(0, -gets.start) for block in blocks)
        gets = hull(block.q for block in blocks)
        return False, gets, tuple(block.shifted(-gets.start, 0) for block in blocks)

    def messages(
        self, keys: Callable[[slice], Tensors], queries: Callable[[slice], Tensors]
    ) -> Iterator[tuple[_Step, Tensors]]:
        """Iterates over (step, tensors that came); the first message leaves now, later ones a step ahead.

        keys, queries: what is sent of these keys, or of these queries, of this rank. Where a step has no blocks the
        tensors are empty.
        """
        first = self._send(self.steps[0], keys, queries) if self.steps else None
        return self._receive(first, keys, queries)

    def _receive(
        self, pending: _Message | None, keys: Callable[[slice], Tensors], queries: Callable[[slice], Tensors]
    ) -> Iterator[tuple[_Step, Tensors]]:
        following = [*self.steps[1:], None][: len(self.steps)]
        for step, next_step in zip(self.steps, following, strict=True):
            assert pending is not None
            came = pending
            came.exchange.wait()
            pending = self._send(next_step, keys, queries) if next_step is not None else None
            yield step, unpack(came.buffer, came.like)

    def _send(self, step: _Step, keys: Callable[[slice], Tensors], queries: Callable[[slice], Tensors]) -> _Message:
        payload = pack(keys(step.sends) if step.sends_keys else queries(step.sends))
        like = keys(step.gets) if step.gets_keys else queries(step.gets)
        buffer = payload.new_empty(packed_size(like))
        message = _Message(Exchange(self.call.ring), buffer, like)
        message.exchange.start(some(payload), some(buffer), hops=step.distance)
        return message

    def reply(self, step: _Step, result: Tensors | None, like: Tensors | None) -> None:
        """Send `result` to whom this step's message came from, and expect tensors like `like` from whom it went to."""
        send = pack(result) if result is not None else None
        receive = like[0].new_empty(packed_size(like), dtype=torch.uint8) if like is not None else None
        exchange = Exchange(self.call.ring)
        exchange.start(some(send), some(receive), hops=-step.distance)
        if receive is not None and like is not None and receive.numel():
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
