"""A rank that dies in the middle of a step takes the others with it in bounded time, rather than leave them hanging."""

import os
import time

import pytest
import torch

from easyctx.functional import seq_parallel_attn_func
from tests.pool import RankPool
from tests.test_parity import SHARDED_MODES

SECONDS = 30


def attend_with_a_rank_that_dies(rank: int, world: int, mode: str) -> float:
    """Seconds until this rank notices; rank 1 is gone after a first call."""
    tensors = [torch.randn(1, 16, 4, 8) for _ in range(3)]
    settings = {"ring_degree": 2} if mode == "usp_attn" else {}
    seq_parallel_attn_func(mode, *tensors, **settings)
    if rank == 1:
        os._exit(9)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        seq_parallel_attn_func(mode, *tensors, **settings)
    return time.monotonic() - begin


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_the_others_notice(mode):
    pool = RankPool(2)
    try:
        assert pool.answers_of([0], attend_with_a_rank_that_dies, mode)[0] < SECONDS
    finally:
        pool.close()
