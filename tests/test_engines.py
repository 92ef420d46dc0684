"""A whole optimizer step under DDP and FSDP2, SP x DP, with accumulation, against one process."""

import pytest
import torch

from tests.engine_jobs import ddp_step, fsdp2_step
from tests.test_parity import SHARDED_MODES, check


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("world", "sp_degree"), [(2, 2), (4, 2), (4, 4)], ids=["sp2", "sp2xdp2", "sp4"])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_ddp(ranks, mode, world, sp_degree, accumulate):
    check(ranks(world).run(ddp_step, mode, sp_degree, accumulate, torch.float64), torch.float64)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_data_parallel(ranks, accumulate):
    check(ranks(2).run(ddp_step, "data_parallel", 1, accumulate, torch.float64), torch.float64)


def test_ddp_float32(ranks):
    check(ranks(4).run(ddp_step, "zigzag_ring_attn", 2, 3, torch.float32), torch.float32)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("world", "sp_degree"), [(2, 2), (4, 2)], ids=["sp2", "sp2xdp2"])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_fsdp2(ranks, mode, world, sp_degree, accumulate):
    check(ranks(world).run(fsdp2_step, mode, sp_degree, accumulate, torch.float64, False), torch.float64)


def test_fsdp2_offloaded(ranks):
    check(ranks(2).run(fsdp2_step, "zigzag_ring_attn", 2, 1, torch.float64, True), torch.float64)
