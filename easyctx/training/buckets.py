"""Rows of different lengths in one run: each batch is padded to one of a few lengths.

So kernels, allocator and compilers meet few shapes, the longest of them `--seq-length`, for which memory is planned.
Padding has no target and nothing attends to it, so the lengths change neither loss nor gradients. Ranks that do not
share a row may have other lengths in the same step: what they send to all others is parameters and gradients.
"""

from bisect import bisect_left

import numpy as np

from easyctx.mesh import Mesh
from easyctx.modes import get_mode
from easyctx.training.config import TrainConfig
from easyctx.training.memory import RunMemory

FINE = 64  # tokens, of which a long shard's length is a multiple: kernels compute in tiles


def bucket_lengths(shortest: int, seq_length: int, count: int, multiple: int) -> list[int]:
    """At most `count` lengths from about `shortest` to `seq_length`, each so many times longer than the one before.

    multiple: all but the last are multiples of this, so that shards need no padding of their own.
    """
    steps = max(count - 1, 1)
    ideal = [shortest * (seq_length / shortest) ** (step / steps) for step in range(count)]
    unit = multiple * FINE if shortest >= FINE * multiple * FINE else multiple
    lengths = {-int(-length // unit) * unit for length in ideal}
    return sorted({length for length in lengths if length < seq_length} | {seq_length})[-count:]


def check_messages(config: TrainConfig, mesh: Mesh, memory: RunMemory | None) -> None:
    """ValueError where ranks with other lengths would send other numbers of messages, and wait for each other forever:
    ZeRO-3 gathers an MLP's weights for each of its tiles."""
    tile = 0 if memory is None else memory.decision.choices.mlp_tile
    if config.buckets and mesh.dp_size > 1 and memory and memory.setting.engine.startswith("zero3") and tile:
        raise ValueError(
            f"--buckets {config.buckets} gives {mesh.dp_size} data-parallel ranks rows of different lengths, so other "
            f"numbers of MLP tiles of {tile:,} tokens, for each of which ZeRO-3 gathers weights: give --mlp-tile 0, "
            f"share each row among all processes (--sp-degree {mesh.sp_size * mesh.dp_size}), or take FSDP2"
        )


class Buckets:
    """The lengths of a run's rows and of its batches.

    Args:
        row_lengths: int64 `[num_rows]`.
        mesh: its shards' unit is that of the lengths.
    """

    def __init__(self, config: TrainConfig, row_lengths: np.ndarray, mesh: Mesh) -> None:
        self.row_lengths = np.minimum(row_lengths, config.seq_length)
        mode = get_mode(config.parallel_mode)
        multiple = 1
        if mode.is_sequence_parallel:
            multiple = mode.shard_layout(mesh.sp_size, mesh.ring_degree).multiple(mesh.sp_size)
        self.lengths = bucket_lengths(int(self.row_lengths.min()), config.seq_length, config.buckets, multiple)

    def padded(self, length: int) -> int:
        """The length of a batch whose longest row has `length` tokens; the last target may be one more."""
        return length if length > self.lengths[-1] else self.lengths[bisect_left(self.lengths, length)]

    def describe(self) -> str:
        padded = np.array(self.lengths)[np.searchsorted(self.lengths, self.row_lengths)]
        padding = 1 - self.row_lengths.sum() / padded.sum()
        return (
            f"rows of {self.row_lengths.min():,} to {self.row_lengths.max():,} tokens are padded to "
            f"{len(self.lengths)} length{'s' if len(self.lengths) > 1 else ''} "
            f"({', '.join(f'{length:,}' for length in self.lengths)}): {padding:.1%} padding in batches of one row"
        )
