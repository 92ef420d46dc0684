"""What `easyctx check` is made of: the small model, what is found in it, its weights and batches, the comparison."""

import pytest
import torch
from transformers import AutoConfig

from easyctx.check.batches import make_batch
from easyctx.check.compare import WHOLE, compare, compare_half
from easyctx.check.float64 import float64_throughout
from easyctx.check.model import make_model
from easyctx.check.probe import probe, stock_attention
from easyctx.check.shrink import kept_layers, shrink
from easyctx.check.steps import Trace


def small(family, **settings):
    config = AutoConfig.for_model(family)
    return config, shrink(config, **({"num_layers": 2, "seq_length": None, "sp": 4} | settings))


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3_moe", "gemma2", "phi3", "gpt_oss"])
def test_shrinking_keeps_what_attention_depends_on(family):
    config, found = small(family)
    kept = found.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (kept.num_attention_heads, kept.head_dim) == (config.num_attention_heads, head_dim)
    assert kept.num_key_value_heads == config.num_key_value_heads
    assert kept.rope_parameters == config.rope_parameters
    assert kept.num_hidden_layers == len(found.layers) == 2
    assert kept.hidden_size < config.hidden_size == AutoConfig.for_model(family).hidden_size
    assert set(getattr(kept, "layer_types", None) or ()) == set(getattr(config, "layer_types", None) or ())
    if top_k := getattr(kept, "num_experts_per_tok", None):
        assert top_k == config.num_experts_per_tok < kept.num_local_experts < config.num_local_experts
        assert small(family, all_experts=True)[1].config.num_local_experts == top_k


def test_every_kind_of_layer_is_kept():
    config, found = small("gemma3_text", num_layers=1)
    assert found.layers == [0, 5]
    assert found.config.layer_types == ["sliding_attention", "full_attention"]
    assert "2 layers instead of 1" in found.notes[0]
    assert kept_layers(AutoConfig.for_model("smollm3"), 3) == [0, 1, 3]  # the first without RoPE
    config = AutoConfig.for_model("qwen3_moe", mlp_only_layers=[3])
    found = shrink(config, num_layers=3, seq_length=50, sp=2)
    assert (found.layers, found.config.mlp_only_layers) == ([0, 1, 3], [2])


def test_windows_matter():
    _, real = small("gpt_oss")
    assert real.config.sliding_window == 128 < real.seq_length == 193
    _, short = small("gpt_oss", seq_length=100)
    assert short.config.sliding_window == 33
    assert "128 -> 33" in short.notes[-1]
    _, long = small("mistral", seq_length=4099)
    assert long.config.sliding_window == 4096
    for sp in (2, 4, 7):
        length = small("mistral", sp=sp)[1].seq_length
        assert all(length % divisor for divisor in range(2, length))
    assert small("gpt_oss", packed=True)[1].seq_length > 3 * 128


def test_rope_that_looks_at_the_length_sees_a_long_one():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = AutoConfig.for_model("llama", rope_parameters=rope)
    assert shrink(config, num_layers=1, seq_length=100, sp=2).config.max_position_embeddings == 90
    packed = shrink(config, num_layers=1, seq_length=100, sp=2, packed=True)
    assert packed.config.max_position_embeddings == config.max_position_embeddings
    assert "stays below" in packed.notes[-1]


@pytest.mark.parametrize(
    ("family", "masks", "attention"),
    [
        ("llama", ["full causal", "full causal"], "sdpa"),
        ("gemma2", ["sliding window 33, logit softcap 50", "full causal, logit softcap 50"], "eager"),
        ("gpt_oss", ["sliding window 128, with sinks", "full causal, with sinks"], "eager"),
        ("smollm3", ["full causal", "full causal, no RoPE"], "sdpa"),
    ],
)
def test_probe(family, masks, attention):
    config, found = small(family)
    model = make_model(found.config, dtype=torch.float32, seed=0, device="cpu")
    layers = probe(model)
    assert [layer.mask for layer in layers] == masks
    assert layers[0].q_heads == config.num_attention_heads
    assert stock_attention(model, layers) == attention


def test_weights_do_not_depend_on_the_dtype():
    config = small("gpt_oss")[1].config
    double, half, rounded = (
        dict(make_model(config, dtype=dtype, seed=3, device="cpu", rounded_to=to).named_parameters())
        for dtype, to in ((torch.float64, None), (torch.bfloat16, None), (torch.float64, torch.bfloat16))
    )
    for name, values in double.items():
        assert torch.equal(values.to(torch.bfloat16), half[name]), name
        assert torch.equal(rounded[name], half[name].double()), name
    assert double["model.layers.0.self_attn.sinks"].std() > 0.5


def test_keep_double():
    x = torch.randn(5, 7, dtype=torch.float64)
    with float64_throughout():
        assert x.float() is x
        assert x.to(torch.float32).dtype == x.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert torch.arange(3).float().dtype == torch.float32
    assert x.float().dtype == torch.float32


def test_batches():
    batch, again = (make_batch(5, seed=1, length=97, vocabulary=50, packed=True) for _ in range(2))
    assert torch.equal(batch.input_ids, again.input_ids)
    assert torch.equal(batch.document_ids, again.document_ids)
    hidden = batch.labels == -100
    assert hidden[-1, :48].all()
    assert 0.1 < hidden[0].double().mean() < 0.5
    for row in range(2):
        lengths = [t.stop - t.start for r, t in batch.documents() if r == row]
        assert len(lengths) == 4
        assert sum(lengths) == 97
        assert max(lengths) >= 48


def trace(*gradients):
    return Trace([1.0] * len(gradients), [{"a": torch.tensor(g), "b": torch.ones(4)} for g in gradients])


def test_comparison_takes_the_worst_step_and_no_nan():
    right, wrong, broken = trace([1.0, 0], [1.0, 0]), trace([1.0, 0], [1.0, 0.5]), trace([1.0, 0], [1.0, float("nan")])
    found = compare(wrong, right, 1e-3)
    assert not found.holds
    assert (found.gradients[0].name, found.gradients[0].step, found.gradients[0].error) == ("a", 2, 0.5)
    assert found.whole.name == WHOLE
    assert compare(right, right, 1e-10).holds
    assert not compare(broken, right, 1e9).holds


def test_half_precision_is_measured_by_one_device():
    exact, one = trace([1.0, 0.0]), trace([1.0, 0.010])
    assert compare_half(trace([1.0, -0.012]), one, exact, 1.25, 0.01).holds
    assert not compare_half(trace([1.0, -0.020]), one, exact, 1.25, 0.01).holds
