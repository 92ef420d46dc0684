"""Every sequence-parallel mode against one process: loss, logits, every parameter's gradient."""

from itertools import cycle

import pytest
import torch

from easyctx.capability import FAMILIES
from easyctx.modes import MODES
from tests.parity import Case, model_parity

SHARDED_MODES = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(ranks, world: int, case: Case) -> None:
    if case.mode == "usp_attn" and case.ring_degree is None:
        case.ring_degree = 2 if world % 2 == 0 else world
    for rank, error in enumerate(ranks(world).run(model_parity, case)):
        for what, value in error.items():
            assert value < TOLERANCE[case.dtype], f"rank {rank}: {what} differs by {value:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_families(ranks, mode, family):
    check(ranks, 2, Case(mode, family, length=45, batch=2))


@pytest.mark.parametrize(("family", "mode"), zip(FAMILIES, cycle(SHARDED_MODES), strict=False))
def test_families_patched_by_name(ranks, family, mode):
    """Every family and every mode: which attention is found by a name does not depend on the mode."""
    check(ranks, 2, Case(mode, family, length=45, by="family"))


@pytest.mark.parametrize("length", [5, 64, 101])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_ranks_and_lengths(ranks, mode, world, length):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 6 if world == 3 else 2, "hidden_size": 96}
    check(ranks, world, Case(mode, length=length, overrides=sizes))


@pytest.mark.parametrize("ring_degree", [1, 2, 4])
def test_ring_degrees(ranks, ring_degree):
    check(ranks, 4, Case("usp_attn", length=70, ring_degree=ring_degree, overrides={"num_attention_heads": 8}))


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_float32(ranks, mode):
    check(ranks, 4, Case(mode, length=203, batch=2, dtype=torch.float32))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (12, 4)], ids=str)
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_head_counts(ranks, mode, heads):
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 8 * heads[0]}
    check(ranks, 4, Case(mode, length=50, overrides=sizes))


@pytest.mark.parametrize("window", [1, 7, 24, 1000])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_sliding_window(ranks, mode, window):
    check(ranks, 4, Case(mode, "mistral", length=90, overrides={"sliding_window": window}))


@pytest.mark.parametrize("packed", ["positions", "documents", "cu_seqlens"])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_packed_documents(ranks, mode, packed):
    check(ranks, 4, Case(mode, length=90, batch=1 if packed == "cu_seqlens" else 2, packed=packed))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_packed_documents_in_windows(ranks, mode, family):
    overrides = {"sliding_window": 9} if family == "mistral" else {}
    check(
        ranks,
        3 if mode in ("ring_attn", "striped_attn") else 2,
        Case(mode, family, 75, packed="documents", overrides=overrides),
    )


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_padding_on_the_right(ranks, mode):
    check(ranks, 4, Case(mode, length=61, batch=2, padded=23))


ROPE = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 4.0, 6.0, 9.0],
        "original_max_position_embeddings": 32,
        "factor": 2.0,
    },
}


@pytest.mark.parametrize("packed", [None, "documents"])
@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "ulysses_attn", "usp_attn"])
def test_rope_kinds(ranks, mode, kind, packed):
    """Lengths past the original one, and padded ones (32 of 32, padded to 36) that must not count as past it."""
    if packed and kind in ("dynamic", "longrope"):
        pytest.skip("one process would have another base for each document: there is no one call to compare with")
    for world, length in ((4, 70), (3, 32)):
        overrides = {"max_position_embeddings": 64 if kind == "longrope" else 32}
        heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96} if world == 3 else {}
        check(ranks, world, Case(mode, length=length, rope=ROPE[kind], overrides=overrides | heads, packed=packed))
