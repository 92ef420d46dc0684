"""Keys and values of tokens that every rank has alike: questions, and what was generated after them.

They are few beside the prompt's, so each rank keeps them all, and nothing is sent for them. Tails of about the same
size share their memory, so that a step which adds a token to each of them is one computation.
"""

from collections.abc import Sequence

import torch

from easyctx.kernel import exact_dtype
from easyctx.schedule import Attention


class TailRows:
    """Memory of some tails, one to a row: `[2, rows, capacity, K, D]` for every layer, made when it is asked for."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._layers: dict[int, torch.Tensor] = {}

    def of_layer(self, layer: int, like_BSKD: torch.Tensor) -> torch.Tensor:
        if layer not in self._layers:  # zeros, since what is not there yet is multiplied by 0 in a step
            self._layers[layer] = like_BSKD.new_zeros((2, self.rows, self.capacity, *like_BSKD.shape[2:]))
        return self._layers[layer]


class Tail:
    """Keys and values of one question's tokens, and of those generated after them.

    Args:
        start: position of the first token.
        capacity: tokens that it will hold at most; 0 for a tail that lasts for one call.
        memory, row: shared with other tails, and which row of it is this one's; default: its own.
    """

    def __init__(self, start: int, capacity: int = 0, memory: TailRows | None = None, row: int = 0) -> None:
        self.start, self.capacity, self.row = start, capacity, row
        self.memory = memory or TailRows(1, capacity)
        self.length = 0

    def with_new(self, layer: int, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer with these new ones `[1, n, K, D]` behind them, which are kept too."""
        if not self.capacity:
            return k_BSKD, v_BSKD
        last = self.length + k_BSKD.shape[1]
        assert last <= self.capacity
        keys, values = self.memory.of_layer(layer, k_BSKD)[:, self.row : self.row + 1]
        keys[:, self.length : last] = k_BSKD
        values[:, self.length : last] = v_BSKD
        return keys[:, :last], values[:, :last]


def make_tails(start: int, capacities: dict[int, int]) -> dict[int, Tail]:
    """Tails by the numbers that the capacities have, in an order in which those that share their memory are neighbours.

    A tail shares memory with tails up to twice its size: at most half of it is never used.
    """
    tails: dict[int, Tail] = {}
    numbers = sorted(capacities, key=lambda number: -capacities[number])
    while numbers:
        longest = capacities[numbers[0]]
        sharers = [number for number in numbers if 2 * capacities[number] >= longest]
        memory = TailRows(len(sharers), longest)
        tails |= {number: Tail(start, capacities[number], memory, row) for row, number in enumerate(sharers)}
        numbers = numbers[len(sharers) :]
    return tails


class Step:
    """One more token for each of several tails that share their memory. Made for a call, used by all layers."""

    def __init__(self, tails: Sequence[Tail]) -> None:
        self.memory = tails[0].memory
        rows, lengths = [tail.row for tail in tails], [tail.length for tail in tails]
        assert all(tail.memory is self.memory and tail.length < tail.capacity for tail in tails)
        self.is_whole = rows == list(range(self.memory.rows))
        self.longest = max(lengths) + 1
        self._places = torch.tensor([rows, lengths])
        self._made: dict[tuple[torch.device, int | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens `[1, rows, ...]` over their own tails, in which they are kept: out, lse in the exact dtype."""
        buffer, exact, score = self.memory.of_layer(layer, k_BSKD), exact_dtype(q_BSHD.dtype), call.score
        rows, newest, hidden = self._on(q_BSHD.device, call.mask.window)
        buffer[:, rows, newest] = torch.cat([k_BSKD, v_BSKD])
        there = buffer[:, :, : self.longest] if self.is_whole else buffer[:, rows, : self.longest]
        # Contiguous [rows, K, longest, D], which products of matrices would copy it to otherwise.
        keys, values = there.transpose(2, 3).to(exact, memory_format=torch.contiguous_format)
        q = q_BSHD[0].unflatten(1, (keys.shape[1], -1)).to(exact)
        scores = (q * score.scale) @ keys.transpose(2, 3)  # [rows, K, H/K, longest]
        if score.softcap is not None:
            scores = torch.tanh(scores / score.softcap) * score.softcap
        scores = scores.masked_fill(hidden, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ values
        return out.flatten(1, 2).unsqueeze(0), lse.flatten(1).t().unsqueeze(0)

    def _on(self, device: torch.device, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tails' rows, the places of their new tokens, and `[rows, 1, 1, longest]` which keys those do not see.

        Copied once to each device: a model may be spread over several, by layers.
        """
        if (device, window) not in self._made:
            rows, newest = self._places.to(device)
            keys, last = torch.arange(self.longest, device=device), newest[:, None, None, None]
            hidden = keys > last
            if window is not None:
                hidden |= keys <= last - window
            self._made[device, window] = rows, newest, hidden
        return self._made[device, window]
