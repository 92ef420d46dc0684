"""Which rows a run sees, in an order that depends on the seed alone: not on the number of ranks, not on restarts."""

from collections.abc import Iterator
from itertools import count

import torch


class GlobalOrder:
    """The rows of each batch of one data-parallel rank, without end; a `batch_sampler` of torch's DataLoader.

    Samples are numbered 0, 1, 2, … over the whole run. Sample g is row `shuffled[g % num_rows]` of the shuffle of
    epoch `g // num_rows`, and batches are dealt to the ranks in turn. So "g samples were seen" says all about where a
    run stands, also to one that goes on with other batches or other ranks.

    Args:
        num_rows: rows of the dataset.
        seed: of the shuffles; epoch e is shuffled with seed + e.
        batch_size: rows to a batch of one rank.
        dp_rank, dp_size: this rank among those that see different data.
        start: samples that all ranks together have seen already.
    """

    def __init__(self, num_rows: int, seed: int, batch_size: int, dp_rank: int, dp_size: int, start: int = 0) -> None:
        self.num_rows, self.seed, self.batch_size = num_rows, seed, batch_size
        self.dp_rank, self.dp_size, self.start = dp_rank, dp_size, start
        self._epoch, self._shuffled = -1, torch.empty(0)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch_size * self.dp_size
        for first in count(self.start + self.dp_rank * self.batch_size, stride):
            yield [self.row(sample) for sample in range(first, first + self.batch_size)]

    def row(self, sample: int) -> int:
        """The row that is sample number `sample` of the run."""
        epoch, index = divmod(sample, self.num_rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._shuffled = epoch, torch.randperm(self.num_rows, generator=generator)
        return int(self._shuffled[index])
