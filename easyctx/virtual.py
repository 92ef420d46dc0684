"""Virtual ranks: the ranks of an axis as threads of one process, so that a ring of 16 runs on any machine.

For tests and for error tables: what is computed and sent is what real ranks compute and send, but nothing is
faster for it. Drive schedules directly: autograd has one thread for a GPU's backward, in which ranks that wait for
each other would wait for ever.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from easyctx.kernel import Kernel, Saved, Score
from easyctx.mask import Mask
from easyctx.mesh import Axis, Mesh, _transports
from easyctx.modes import Mode
from easyctx.schedule import Attention

TIMEOUT_SECONDS = 60.0


class _Mailboxes:
    """What is on its way within one axis. As with real ranks, the n-th message from one rank to another is for the n-th
    receive that the latter has started, whenever it waits for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int], int] = defaultdict(int)
        self.asked: dict[tuple[int, int], int] = defaultdict(int)
        self.arrived: dict[tuple[int, int, int], torch.Tensor] = {}
        self.failed = threading.Event()
        self.bytes_sent: dict[int, int] = defaultdict(int)

    def put(self, source: int, to: int, message: torch.Tensor) -> None:
        with self.changed:
            if source != to:
                self.bytes_sent[source] += message.numel() * message.element_size()
            self.arrived[source, to, self.sent[source, to]] = message.clone()
            self.sent[source, to] += 1
            self.changed.notify_all()

    def ask(self, source: int, to: int) -> Callable[[], torch.Tensor]:
        """Start receiving; returns what waits for the message and gives it."""
        with self.changed:
            key = (source, to, self.asked[source, to])
            self.asked[source, to] += 1
        return lambda: self._get(key)

    def _get(self, key: tuple[int, int, int]) -> torch.Tensor:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with self.changed:
            while key not in self.arrived:
                if self.failed.is_set() or time.monotonic() > deadline:
                    reason = "another rank failed" if self.failed.is_set() else f"{TIMEOUT_SECONDS} s went by"
                    raise TimeoutError(f"virtual rank {key[1]} got nothing from rank {key[0]}: {reason}")
                self.changed.wait(timeout=0.05)
            return self.arrived.pop(key)


class VirtualTransport:
    """One rank's end of the mailboxes."""

    def __init__(self, mail: _Mailboxes, rank: int, size: int) -> None:
        self.mail, self.rank, self.size = mail, rank, size

    def exchange(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> Callable[[], None]:
        if send is not None:
            self.mail.put(self.rank, to, send)
        arrival = self.mail.ask(source, self.rank) if receive is not None else None

        def wait() -> None:
            if receive is not None and arrival is not None:
                message = arrival()
                assert message.dtype == receive.dtype
                assert message.numel() == receive.numel(), "a message of another length than was expected"
                receive.copy_(message.view_as(receive))

        return wait

    def all_to_all(self, send: torch.Tensor) -> Callable[[], torch.Tensor]:
        for to in range(self.size):
            self.mail.put(self.rank, to, send[to])
        arrivals = [self.mail.ask(source, self.rank) for source in range(self.size)]
        return lambda: torch.stack([arrival() for arrival in arrivals])


class VirtualRanks:
    """`size` virtual ranks, in a ring of `ring_degree` where that is given (as `make_mesh` would lay them)."""

    def __init__(self, size: int, ring_degree: int | None = None) -> None:
        self.size = size
        self._mail: list[_Mailboxes] = []
        sp = self._axes(list(range(size)))
        if ring_degree is None:
            self.meshes = [Mesh(sp=axis) for axis in sp]
            return
        ulysses_degree = size // ring_degree
        rings = [self._axes(list(range(u, size, ulysses_degree))) for u in range(ulysses_degree)]
        groups = [self._axes(list(range(r * ulysses_degree, (r + 1) * ulysses_degree))) for r in range(ring_degree)]
        self.meshes = [
            Mesh(
                sp=sp[rank],
                ring=rings[rank % ulysses_degree][rank // ulysses_degree],
                ulysses=groups[rank // ulysses_degree][rank % ulysses_degree],
            )
            for rank in range(size)
        ]

    def _axes(self, ranks: list[int]) -> list[Axis]:
        mail = _Mailboxes()
        self._mail.append(mail)
        axes = [Axis(place, len(ranks)) for place in range(len(ranks))]
        for axis in axes:
            _transports[axis] = VirtualTransport(mail, axis.rank, axis.size)
        return axes

    def run(self, job: Callable[[Mesh], Any]) -> list[Any]:
        """`job(mesh)` on every rank at once; their results in rank order. The first rank's error is raised."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = job(self.meshes[rank])
            except BaseException as error:
                errors.append(error)
                for mail in self._mail:
                    mail.failed.set()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # Ranks that waited for the one that failed gave up after it.
            raise next((e for e in errors if not isinstance(e, TimeoutError)), errors[0])
        return results

    def bytes_sent(self) -> int:
        """Bytes that left any rank for another one so far."""
        return sum(sum(mail.bytes_sent.values()) for mail in self._mail)

    def close(self) -> None:
        """Forget the ranks."""
        for mesh in self.meshes:
            for axis in (mesh.sp, mesh.ring, mesh.ulysses):
                _transports.pop(axis, None)


def virtual_attention(
    mode: Mode,
    ranks: VirtualRanks,
    tensors: tuple[torch.Tensor, ...],
    mask: Mask,
    score: Score,
    kernel: Kernel,
) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv of whole sequences, through `mode` over virtual ranks.

    tensors: q `[B, S, H, D]`, k and v `[B, S, K, D]`, dout as q, of a length that the mode's layout takes. Results
    are shaped as their namesakes, lse `[B, H, S]`; out and gradients are as the schedule leaves them, unrounded
    where it can.
    """

    def job(mesh: Mesh) -> tuple[torch.Tensor, ...]:
        assert mode.schedule is not None
        layout = mode.shard_layout(mesh.sp_size, mesh.ring_degree)
        q, k, v, dout = (layout.shard(t, mesh.sp_size, mesh.sp_rank) for t in tensors)
        ring, ulysses = mode.axes(mesh)
        call = Attention(mode.layout, kernel, score, mask, ring, ulysses)
        out, lse = mode.schedule.forward(q, k, v, call)
        out = out.to(q.dtype)
        return out, lse, *mode.schedule.backward(dout, Saved(q, k, v, out, lse), call)

    size = ranks.size
    layout = mode.shard_layout(size, ranks.meshes[0].ring_degree)
    results = zip(*ranks.run(job), strict=True)
    return tuple(layout.unshard(parts, dim=2 if i == 1 else 1) for i, parts in enumerate(results))
