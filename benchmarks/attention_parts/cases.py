"""What benchmarks/attention.py measures: shapes, masks, the work in them, tensors that every rank can make alike."""

import random
from dataclasses import dataclass, replace

import torch

from easyctx.documents import Documents
from easyctx.kernel import Workload
from easyctx.layout import Layout
from easyctx.mask import CAUSAL_MASK, Mask

MASKS = ("causal", "window", "packed")
TENSORS = ("q", "k", "v", "dout")
MOST_LOCAL = 262144  # so that it fits on one device; its rate is compared, not its time
BACKWARD = 2.5  # matrix products of a backward, in units of its forward's: five instead of two


@dataclass(frozen=True)
class Case:
    """Attention over `ranks * tokens` tokens, batch 1. heads: (query, key/value)."""

    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    ranks: int
    tokens: int
    mask_name: str = "causal"
    mask: Mask = CAUSAL_MASK

    @property
    def length(self) -> int:
        return self.ranks * self.tokens

    @property
    def workload(self) -> Workload:
        packed = self.mask.documents is not None
        return Workload(self.device, self.dtype, self.head_dim, self.mask.window is not None, packed=packed)

    def whole(self, name: str) -> torch.Tensor:
        """One of TENSORS, `[1, length, heads, D]`: the same on every rank, whatever the layout."""
        index = TENSORS.index(name)
        generator = torch.Generator(self.device).manual_seed(index)
        shape = (1, self.length, self.heads[index in (1, 2)], self.head_dim)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

    def shards(self, layout: Layout, rank: int) -> tuple[torch.Tensor, ...]:
        """This rank's q, k, v and dout, `[1, tokens, heads, D]`; one whole tensor is held at a time."""
        return tuple(layout.shard(self.whole(name), self.ranks, rank) for name in TENSORS)

    def first_keys(self, positions: torch.Tensor) -> torch.Tensor:
        """The first position that each of these queries sees; it sees all from there to itself."""
        first = torch.zeros_like(positions)
        if self.mask.window is not None:
            first = (positions - self.mask.window + 1).clamp(min=0)
        if self.mask.documents is not None:
            starts = torch.tensor(self.mask.documents.starts[0], device=positions.device)
            own = torch.searchsorted(starts, positions, right=True) - 1
            first = torch.maximum(first, starts[own])
        return first

    def pairs(self, positions: torch.Tensor | None = None) -> int:
        """Pairs of a query and a key that it sees, of the queries at these positions (default: all)."""
        positions = torch.arange(self.length) if positions is None else positions
        return int((positions - self.first_keys(positions) + 1).sum())

    def forward_flops(self, pairs: float) -> float:
        """Of so many pairs, in all query heads: two products of head dim."""
        return 4.0 * self.head_dim * self.heads[0] * pairs

    def one_device(self, pairs: float) -> "Case":
        """Causal attention on one device with as many pairs: a multiple of 128 tokens, MOST_LOCAL at most."""
        tokens = min(max(round((2 * pairs) ** 0.5 / 128), 1) * 128, MOST_LOCAL)
        return replace(self, ranks=1, tokens=tokens, mask_name="causal", mask=CAUSAL_MASK)


def make_mask(name: str, length: int, window: int, documents: int) -> Mask:
    """One of MASKS: a sliding window of `window` tokens, or so many documents of random lengths."""
    if name == "window":
        return Mask(window).within(length)
    if name == "packed":
        starts = random.Random(0).sample(range(1, length), min(documents, length) - 1)
        return Mask(documents=Documents(length, ((0, *sorted(starts)),))).within(length)
    return CAUSAL_MASK
