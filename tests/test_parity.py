"""Every sequence-parallel mode against one process: loss, logits, every parameter's gradient."""

import pytest
import torch

from easyctx.capability import FAMILIES
from easyctx.modes import MODES
from tests.parity import model_parity

SHARDED_MODES = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(errors: list[dict[str, float]], dtype: torch.dtype) -> None:
    for rank, error in enumerate(errors):
        for what, value in error.items():
            assert value < TOLERANCE[dtype], f"rank {rank}: {what} differs by {value:.2e}"


@pytest.mark.parametrize("by", ["instance", "family"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_families(ranks, mode, family, by):
    check(ranks(2).run(model_parity, mode, family, 37, 2, torch.float64, {}, by), torch.float64)


@pytest.mark.parametrize("length", [5, 64, 101])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_ranks_and_lengths(ranks, mode, world, length):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 6 if world == 3 else 2, "hidden_size": 96}
    check(ranks(world).run(model_parity, mode, "llama", length, 1, torch.float64, sizes, "instance"), torch.float64)


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_float32(ranks, mode):
    check(ranks(4).run(model_parity, mode, "llama", 203, 2, torch.float32, {}, "instance"), torch.float32)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (12, 4)], ids=str)
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_head_counts(ranks, mode, heads):
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 8 * heads[0]}
    check(ranks(4).run(model_parity, mode, "llama", 50, 1, torch.float64, sizes, "instance"), torch.float64)


@pytest.mark.parametrize("window", [1, 7, 24, 1000])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_sliding_window(ranks, mode, window):
    errors = ranks(4).run(model_parity, mode, "mistral", 90, 1, torch.float64, {"sliding_window": window}, "instance")
    check(errors, torch.float64)
