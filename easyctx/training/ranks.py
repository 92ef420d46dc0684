"""Small talk between the processes of a run, on the CPU and apart from the messages of training."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from easyctx.mesh import num_processes


class Ranks:
    """All processes of the run in a gloo group of their own, which one thread may use beside another's groups.

    All ranks must make it together, and call its methods in the same order.
    """

    def __init__(self, timeout_seconds: float = 1800.0) -> None:
        self.size = num_processes()
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.group: dist.ProcessGroup | None = None
        if self.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, value: int) -> int:
        """The largest value that any rank gave, on every rank."""
        if self.group is None:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)
