"""`--rope-scaling yarn`: its frequencies are the paper's, and later stages count from the same length."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyctx.training.model import set_rope, set_yarn
from tests.models import tiny_config

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def yarn_frequencies(base: float, dim: int, original: int, factor: float) -> torch.Tensor:
    """By the paper (arXiv 2309.00071, 3.2): what turns over 32 times within the original length stays, what turns
    less than once is interpolated, with a ramp over the dimensions between."""
    theta = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return theta * kept + theta / factor * (1 - kept)


def test_yarn_is_the_papers_and_a_later_stage_counts_from_the_same_length():
    config = tiny_config("llama")
    original = config.max_position_embeddings
    for factor in (2, 8):
        set_yarn(config, factor, seq_length=factor * original)
        set_rope(config, 5e4, seq_length=factor * original)
        assert config.max_position_embeddings == factor * original
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
        want = yarn_frequencies(5e4, config.head_dim, original, factor)
        torch.testing.assert_close(rotary.inv_freq.double(), want, rtol=1e-5, atol=0)
        assert rotary.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)
    assert config.rope_parameters["original_max_position_embeddings"] == original
    with pytest.raises(ValueError, match=f"--rope-factor 8 of the {original:,} tokens .* give at least 16"):
        set_yarn(config, 8, seq_length=16 * original)
    for other in (tiny_config("gemma3_text"), tiny_config("llama", rope_parameters=LINEAR)):
        with pytest.raises(ValueError, match="--rope-scaling yarn cannot be put upon"):
            set_yarn(other, 4, seq_length=8)
