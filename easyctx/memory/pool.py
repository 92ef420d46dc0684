"""Host memory for what a step keeps, allocated once: slabs, cut into blocks of one size that come and go."""

import gc

import torch

BLOCK = 1 << 24
_SLAB = 1 << 30  # a power of two: PyTorch rounds what it pins up to one


class HostPool:
    """At least `capacity` bytes of host memory, pinned where there is a GPU."""

    def __init__(self, capacity: int, pin: bool, block: int = BLOCK) -> None:
        assert block.bit_count() == 1, "slabs are powers of two, and so must blocks be"
        self.block = block
        self.slabs: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []
        slab = max(block, _SLAB)
        while (missing := capacity - self.capacity) > 0:
            size = slab if missing >= slab else max(block, 1 << (missing - 1).bit_length())
            self.slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=pin))
            self._free += list(self.slabs[-1].split(block))[::-1]
        self.most_used = 0

    @property
    def capacity(self) -> int:
        return sum(len(slab) for slab in self.slabs)

    @property
    def used(self) -> int:
        return self.capacity - len(self._free) * self.block

    def blocks_for(self, size: int) -> int:
        return -(-size // self.block)

    def take(self, size: int) -> list[torch.Tensor]:
        """Blocks for `size` bytes, uint8 `[block]` each.

        Raises MemoryError if they are not there, with both numbers.
        """
        count = self.blocks_for(size)
        if count > len(self._free):
            gc.collect()  # a graph that was never run backward holds its blocks until its cycles are found
        if count > len(self._free):
            raise MemoryError(
                f"the host pool of {self.capacity:,} bytes has {len(self._free) * self.block:,} left, and {size:,} "
                "are to be kept: it was made for shorter sequences, or for fewer at a time"
            )
        blocks = [self._free.pop() for _ in range(count)]
        self.most_used = max(self.most_used, self.used)
        return blocks

    def give_back(self, blocks: list[torch.Tensor]) -> None:
        self._free += blocks

    @staticmethod
    def bytes_for(sizes: list[int], block: int = BLOCK) -> int:
        """The capacity that holds tensors of these sizes, in bytes, at once."""
        return sum(-(-size // block) * block for size in sizes)
