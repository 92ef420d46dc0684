"""RoPE that depends on the length: every rank's angles are those of one process on the whole sequence."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from easyctx.rope import needs_global_length, use_global_length
from tests.models import FAMILY_EXTRAS, tiny_config, tiny_model

ORIGINAL = 32  # the length up to which frequencies are the original ones
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {**FACTORS, "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "proportional": {"partial_rotary_factor": 0.5},
}
LOOK_AT_LENGTH = {"dynamic", "longrope"}
# Beyond the original length, shorter but still beyond, within it (dynamic RoPE goes back), just beyond, and just within
# it, with padding that lies beyond.
LENGTHS = [20, 50, 90, 40, 30, ORIGINAL + 1, ORIGINAL, 64]


def parameters(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **PARAMETERS[kind]}


def settings(family: str, kind: str) -> dict[str, Any]:
    """Overrides that give `family` RoPE of `kind`; Gemma 3 only in its full-attention layers."""
    rope = parameters(kind)
    if family == "gemma3_text":
        rope = {"sliding_attention": parameters("default"), "full_attention": rope}
    # Phi-3's own attribute, 4096 by default, would replace what `rope` says.
    original = {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    return {"rope_parameters": rope, "max_position_embeddings": ORIGINAL, **original}


CASES = [
    ("llama", "dynamic"),
    ("llama", "longrope"),
    ("phi3", "longrope"),
    ("gemma3_text", "dynamic"),
    ("gpt_oss", "dynamic"),
]


@pytest.mark.parametrize("kind", sorted(ROPE_INIT_FUNCTIONS))
def test_which_kinds_look_at_the_length(kind):
    """If transformers adds a kind, or makes one depend on the length, this is where it shows."""
    config = tiny_config("llama", **settings("llama", kind))
    frequencies = [ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)[0] for length in (None, 8, 4096)]
    assert torch.equal(frequencies[0], frequencies[1])
    assert torch.equal(frequencies[0], frequencies[2]) is (kind not in LOOK_AT_LENGTH)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_needs_global_length(kind):
    for family in ("llama", "gemma3_text"):
        config = tiny_config(family, **settings(family, kind))
        assert needs_global_length(config) is (kind in LOOK_AT_LENGTH)


def test_needs_global_length_of_other_configurations():
    assert not any(needs_global_length(tiny_config(family)) for family in FAMILY_EXTRAS)
    config = tiny_config("llama")
    config.rope_parameters = None
    assert not needs_global_length(config)
    config.rope_parameters = {"sliding_attention": None, "full_attention": {"rope_type": "longrope"}}
    assert needs_global_length(config)
    config.rope_parameters = {"rope_type": "of_next_year"}
    assert needs_global_length(config)


def rotary(family: str, kind: str) -> nn.Module:
    return tiny_model(family, **settings(family, kind)).model.rotary_emb


def angles(module: nn.Module, positions: torch.Tensor) -> list[torch.Tensor]:
    """cos and sin `[B, S, D]`, for each layer type where RoPE has several."""
    x = torch.zeros(1, dtype=torch.float64)
    if isinstance(module.rope_type, dict):
        return [t for layer_type in sorted(module.rope_type) for t in module(x, positions, layer_type)]
    return list(module(x, position_ids=positions))


SHARDS: dict[str, Callable[[torch.Tensor, int], list[torch.Tensor]]] = {
    "contiguous": lambda x, world: list(x.chunk(world, dim=1)),
    "striped": lambda x, world: [x[:, rank::world] for rank in range(world)],
}


@pytest.mark.parametrize("layout", SHARDS)
@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_ranks_rotate_as_one_process(family, kind, layout, as_tensor):
    """Over a history of lengths, with 1 to 8 tokens of padding; ranks and one process keep the same state."""
    world = 4
    whole = rotary(family, kind)
    ranks = [deepcopy(whole) for _ in range(world)]
    largest: list[Any] = [0]
    for module in ranks:
        use_global_length(module, lambda: largest[0])
    for length in LENGTHS:
        largest[0] = torch.tensor(length - 1) if as_tensor else length - 1
        want = angles(whole, torch.arange(length)[None])
        padded = torch.arange(length + 8 - length % 8)[None].expand(2, -1)
        local = SHARDS[layout](padded, world)
        for rank, module in enumerate(ranks):
            real = local[rank][0] < length
            for got, each in zip(angles(module, local[rank]), want, strict=True):
                assert got.shape == (2, *local[rank].shape[1:], each.shape[-1])
                assert torch.equal(got[:, real], each[:, local[rank][0][real]].expand(2, -1, -1)), (length, rank)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_without_it_ranks_differ(family, kind):
    whole, rank = rotary(family, kind), rotary(family, kind)
    positions = torch.arange(64)[None]
    want, got = angles(whole, positions), angles(rank, positions[:, :16])
    assert not all(torch.equal(g, w[:, :16]) for g, w in zip(got, want, strict=True))


def test_undo():
    model = tiny_model("llama", **settings("llama", "dynamic"))
    module = model.model.rotary_emb
    want = angles(module, torch.arange(8)[None])
    undo = use_global_length(model, lambda: 63)
    assert not torch.equal(angles(module, torch.arange(8)[None])[0], want[0])
    undo()
    undo()
    assert "forward" not in vars(module)
    angles(module, torch.arange(8)[None])  # the length is within the original one: dynamic RoPE goes back
    assert torch.equal(angles(module, torch.arange(8)[None])[0], want[0])


def test_undo_keeps_what_was_there():
    """Another's wrapper on the instance, as accelerate's hooks are, is called and comes back."""
    module = rotary("llama", "dynamic")
    calls = []
    own = module.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].max())
        return own(*args, **kwargs)

    module.forward = hooked
    undo = use_global_length(module, lambda: 63)
    angles(module, torch.arange(8)[None])
    assert calls == [63]
    undo()
    assert module.forward is hooked


@pytest.mark.parametrize("family", FAMILY_EXTRAS)
def test_fixed_kinds_are_left_alone(family):
    model = tiny_model(family)
    undo = use_global_length(model, lambda: 1 / 0)
    assert not any("forward" in vars(module) for module in model.modules())
    undo()
