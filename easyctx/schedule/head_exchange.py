"""Exchanging tokens for heads, a group of heads at a time, so that one group is computed while others travel.

P ranks; a rank's share of x heads is x / P of them, and a group is the same part of every rank's share. Tensors come
in two kinds: those of query heads, and those of key heads, which may be fewer. All tensors of one dtype make one
message.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from easyctx.mesh import Axis

MOST_GROUPS = 4  # more would hide little more
WORD = torch.complex128
ROWS_OF_A_GROUP = 1 << 17  # query rows over all heads that keep a large GPU busy for a while; no group has fewer

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class HeadGroup:
    """Which of a rank's heads a group has, counted within its share."""

    queries: slice
    keys: slice


class HeadGroups:
    """How `q_heads` and `kv_heads` heads of `length` tokens on `degree` ranks fall into groups of whole key heads."""

    def __init__(self, q_heads: int, kv_heads: int, length: int, degree: int) -> None:
        self.q_share, self.k_share = q_heads // degree, max(kv_heads // degree, 1)
        per_key = self.q_share // self.k_share
        most = max(1, min(MOST_GROUPS, length * self.q_share // ROWS_OF_A_GROUP))
        count = max(n for n in range(1, most + 1) if self.k_share % n == 0)
        keys = self.k_share // count
        self.all = [
            HeadGroup(slice(i * keys * per_key, (i + 1) * keys * per_key), slice(i * keys, (i + 1) * keys))
            for i in range(count)
        ]


class ToHeads:
    """Iterates over (group, tensors of that group): [B, S/P, heads, D] of this rank's tokens become
    [B, S, heads of the group, D] of this rank's heads. A group's exchange starts when the one before it is handed out.
    """

    def __init__(self, axis: Axis, groups: HeadGroups, *, of_queries: Tensors, of_keys: Tensors) -> None:
        self.axis, self.groups, self.of_queries, self.of_keys = axis, groups, of_queries, of_keys

    def __iter__(self) -> Iterator[tuple[HeadGroup, Tensors]]:
        coming = self._ask(self.groups.all[0])
        for group, following in zip(self.groups.all, [*self.groups.all[1:], None], strict=True):
            arrived = coming()
            if following is not None:
                coming = self._ask(following)
            yield group, arrived

    def _ask(self, group: HeadGroup) -> Callable[[], Tensors]:
        size = self.axis.size
        parts = [t.unflatten(2, (size, -1))[:, :, :, group.queries] for t in self.of_queries]
        parts += [t.unflatten(2, (size, -1))[:, :, :, group.keys] for t in self.of_keys]
        # [P, B, S/P, heads, D], by the rank whose heads they are; back come those of this rank's, by whose tokens.
        waits = _exchange(self.axis, [part.movedim(2, 0) for part in parts])
        return lambda: [received.movedim(0, 1).flatten(1, 2) for received in waits()]


class ToSequence:
    """The inverse, group by group: [B, S, heads of the group, D] of this rank's heads come back as
    [B, S/P, heads, D] of this rank's tokens, once all groups were sent and are collected."""

    def __init__(self, axis: Axis, groups: HeadGroups) -> None:
        self.axis, self.groups = axis, groups
        self._sent: list[tuple[list[slice], Callable[[], Tensors]]] = []
        self._shares: list[int] = []

    def send(self, group: HeadGroup, *, of_queries: Tensors, of_keys: Sequence[torch.Tensor] = ()) -> None:
        """Start sending a group's results; every group has as many of them, in the same order."""
        heads = [group.queries] * len(of_queries) + [group.keys] * len(of_keys)
        self._shares = [self.groups.q_share] * len(of_queries) + [self.groups.k_share] * len(of_keys)
        # [P, B, S/P, heads, D], by the rank whose tokens they are
        parts = [t.unflatten(1, (self.axis.size, -1)).movedim(1, 0) for t in (*of_queries, *of_keys)]
        self._sent.append((heads, _exchange(self.axis, parts)))

    def collect(self) -> Tensors:
        whole: Tensors = []
        for heads, wait in self._sent:
            received = wait()
            if not whole:
                whole = [_whole(part, share) for part, share in zip(received, self._shares, strict=True)]
            for result, part, place in zip(whole, received, heads, strict=True):
                _copy(part.movedim(0, 2), result[:, :, :, place])
        return [result.flatten(2, 3) for result in whole]


def _whole(part_PBSHD: torch.Tensor, share: int) -> torch.Tensor:
    """Memory for all groups: [B, S/P, P, heads of a rank, D]."""
    size, batch, length, _, head_dim = part_PBSHD.shape
    return part_PBSHD.new_empty((batch, length, size, share, head_dim))


def _message(parts: Tensors) -> torch.Tensor:
    """The parts side by side along their heads, in one piece of memory."""
    if len(parts) == 1 and parts[0].is_contiguous():
        return parts[0]
    heads = [part.shape[3] for part in parts]
    message = parts[0].new_empty((*parts[0].shape[:3], sum(heads), parts[0].shape[4]))
    for part, place in zip(parts, message.split(heads, dim=3), strict=True):
        _copy(part, place)
    return message


def _copy(source: torch.Tensor, to: torch.Tensor) -> None:
    """In words of 16 bytes where both allow it: a GPU copies what is in pieces value by value, whatever their size."""
    if all(_has_words(t) for t in (source, to)):
        source, to = source.view(WORD), to.view(WORD)
    to.copy_(source)


def _has_words(x: torch.Tensor) -> bool:
    values = WORD.itemsize // x.element_size()  # to a word
    steps = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and x.data_ptr() % WORD.itemsize == 0 and all(step % values == 0 for step in steps)


def _exchange(axis: Axis, parts: Tensors) -> Callable[[], Tensors]:
    """All-to-all of parts [P, B, S/P, heads, D]; those of one dtype and head dim share a message."""
    kinds: dict[tuple[torch.dtype, int], list[int]] = {}
    for i, part in enumerate(parts):
        kinds.setdefault((part.dtype, part.shape[4]), []).append(i)
    sent = []
    for members in kinds.values():
        sent.append((members, axis.transport.all_to_all(_message([parts[i] for i in members]))))

    def wait() -> Tensors:
        received: dict[int, torch.Tensor] = {}
        for members, arrived in sent:
            pieces = arrived().split([parts[i].shape[3] for i in members], dim=3)
            received |= dict(zip(members, pieces, strict=True))
        return [received[i] for i in range(len(parts))]

    return wait
