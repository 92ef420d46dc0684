"""DistFlashAttn's balance: who computes which pairs, counted without communication."""

import pytest

from easyctx.kernel import KERNELS, Score
from easyctx.layout import CONTIGUOUS
from easyctx.mask import Mask
from easyctx.mesh import Axis
from easyctx.schedule import Attention
from easyctx.schedule.dist_flash import _Traffic


def pairs_of_rank(size: int, local: int, rank: int, window: int | None) -> int:
    """Query-key pairs that `rank` computes."""
    call = Attention(CONTIGUOUS, KERNELS["reference"], Score(1.0), Mask(window), ring=Axis(rank, size))
    traffic = _Traffic(call, local)
    blocks = [*traffic.own_blocks, *(block for step in traffic.steps for block in step.blocks)]
    return sum(int(b.band.allowed(b.q.stop - b.q.start, b.k.stop - b.k.start).sum()) for b in blocks)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16])
def test_every_rank_does_the_same_work(size):
    work = [pairs_of_rank(size, 12, rank, None) for rank in range(size)]
    whole = 12 * size
    assert sum(work) == whole * (whole + 1) // 2
    assert len(set(work)) == 1


@pytest.mark.parametrize("window", [1, 5, 12, 13, 30, 95])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_windows_are_covered_once(size, window):
    whole = 12 * size
    work = [pairs_of_rank(size, 12, rank, window) for rank in range(size)]
    assert sum(work) == sum(min(position + 1, window) for position in range(whole))
