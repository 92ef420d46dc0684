"""The formulas of memory: against real models' parameters, and against what autograd really keeps."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from easyctx.memory.budget import Choices, LayerChoice, MemoryShape, Setting, Widths, predict
from easyctx.memory.matrices import Adapters
from easyctx.memory.pinned import rounded_away
from easyctx.memory.working_set import kept_everything, mlp_kept
from tests.models import FAMILY_EXTRAS, tiny_config

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
GIB = 2**30


@pytest.mark.parametrize("family", FAMILY_EXTRAS)
def test_parameters_are_counted_exactly(family):
    config = tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert MemoryShape.from_config(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILY_EXTRAS)
def test_pinned_weights_and_gradients_take_powers_of_two(family):
    config = tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    large = [4 * p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "bias" not in name]
    rounded = sum((1 << (size - 1).bit_length()) - size for size in large)
    shape, setting = MemoryShape.from_config(config), Setting(tokens=8, engine="fsdp2_offload")
    assert rounded_away(shape, setting) == 2 * rounded > 0
    assert rounded_away(shape, replace(setting, pins=False)) == rounded_away(shape, replace(setting, engine="ddp")) == 0


def test_quantized_matrices_are_pinned_in_half_a_byte_a_weight():
    """The embedding and the head stay in bfloat16."""
    plain = replace(MemoryShape.from_config(LLAMA_3_8B), adapters=Adapters(8, ("q_proj",)))
    quantized = replace(plain, adapters=Adapters(8, ("q_proj",), quantize="nf4"))
    setting = Setting(tokens=8, engine="fsdp2_offload", weight_bytes=2)
    mlp, vocab = 3 * 32 * (2**26 - 14336 * 4096), 2 * (2**29 - 128256 * 4096)  # the others are powers of two
    assert rounded_away(plain, setting) == 2 * (mlp + vocab)
    assert rounded_away(quantized, setting) == mlp // 2 + 2 * vocab


def test_published_sizes_of_llama_3_8b():
    """256 KiB of layer inputs and 260 KiB of attention outputs a token; 16 bytes a parameter over two GPUs."""
    shape = MemoryShape.from_config(LLAMA_3_8B)
    assert shape.parameters == 8_030_261_248
    setting = Setting(tokens=1024, engine="fsdp2", ranks=2, ring=2)
    on_host = predict(shape, setting, Choices.alike(32, LayerChoice("host", "host")))
    assert on_host.host["kept for the backward"] == 1024 * (256 + 260) * 1024
    terms = on_host.gpu
    assert terms["weights"] + terms["optimizer state"] == pytest.approx(12 * shape.parameters / 2)


def test_every_choice_lowers_what_it_is_about():
    shape = MemoryShape.from_config(LLAMA_3_8B)
    setting = Setting(tokens=131_072, engine="fsdp2", ranks=2, local_ranks=2, ring=2)

    def peaks(**choices):
        found = predict(shape, setting, Choices.alike(32, **choices))
        return found.gpu_peak, found.host_peak

    gpu, host = peaks(layer=LayerChoice("gpu", "gpu"))
    again, _ = peaks(layer=LayerChoice("gpu", "recompute"))
    assert gpu - again > 30 * GIB
    spilled, more_host = peaks(layer=LayerChoice("host", "host"))
    assert spilled < again
    assert more_host - host == 2 * 131_072 * (256 + 260) * 1024
    every_4th, _ = peaks(layer=LayerChoice("gpu", "gpu"), every=4)
    assert every_4th < gpu - 20 * GIB
    tiled, _ = peaks(layer=LayerChoice("host", "host"), mlp_tile=8192)
    assert tiled < spilled
    norms, _ = peaks(layer=LayerChoice("host", "host"), mlp_tile=8192, tiled_norms=True)
    assert norms < tiled
    groups, _ = peaks(layer=LayerChoice("host", "host"), mlp_tile=8192, tiled_norms=True, head_groups=8)
    assert groups < norms


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_what_the_kernels_of_liger_leave(family):
    """A norm's input alone, of heads too; of the MLP no result of the activation, but for gpt-oss's own activation."""
    shape, widths = MemoryShape.from_config(tiny_config(family)), Widths()
    fused, choices = replace(shape, fused=True), Choices.alike(2)
    of_mlp = mlp_kept(shape, widths) - mlp_kept(fused, widths)
    assert of_mlp == (0 if family == "gpt_oss" else 2 * shape.intermediate)
    saved = kept_everything(shape, widths, choices) - kept_everything(fused, widths, choices) - of_mlp
    heads = shape.q_width + shape.kv_width // 2 if shape.head_norms else 0
    # The input is one of two copies that are saved: a float32 one, and the result before the weight.
    assert saved == 2 * (4 + 2 - 2) * shape.hidden + (4 + 2) * heads


def test_the_first_input_must_be_kept():
    with pytest.raises(ValueError, match="no checkpointed layer before it"):
        Choices((LayerChoice("recompute", "gpu"),))
    with pytest.raises(ValueError, match="3 layers were given, and the model has 32"):
        predict(MemoryShape.from_config(LLAMA_3_8B), Setting(tokens=8), Choices.alike(3))
