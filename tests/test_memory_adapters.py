"""What is counted of adapters, quantised weights and optimizers, against the real ones; what a policy makes of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from easyctx.adapters.inject import linear_names, put_lora, train_whole
from easyctx.cost.hardware import DEVICES, Cluster
from easyctx.cost.models import load_shape_config
from easyctx.cost.step import Step, matrix_flops, step_cost
from easyctx.memory import adapters as count
from easyctx.memory.adapters import Adapters
from easyctx.memory.budget import Choices, Kept, LayerChoice, MemoryShape, Setting, predict, states
from easyctx.memory.policy import Budget, Wishes, decide, longest_that_fits
from tests.models import FAMILY_EXTRAS, tiny_config

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
GIB = 2**30


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("family", FAMILY_EXTRAS)
def test_trained_parameters_are_counted_exactly(family):
    config = tiny_config(family)
    model = adapted_model(config, None, ("embeddings", "norms"))
    shape = MemoryShape.from_config(config)
    shape = shape.with_adapters(Adapters(3, shape.matrix_names, embeddings=True, norms=True))
    assert count.trained_parameters(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("targets", [None, ["q_proj"], ["down_proj"], ["gate_proj", "up_proj", "k_proj"]])
@pytest.mark.parametrize(
    "layers", [{}, {"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [3], "decoder_sparse_step": 2}], ids=str
)
def test_layers_with_and_without_experts_are_counted_each(layers, targets):
    config = tiny_config("qwen3_moe", **{"num_hidden_layers": 4, "intermediate_size": 80} | layers)
    model = adapted_model(config, targets, ("norms",))
    shape = MemoryShape.from_config(config)
    assert shape.parameters == sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    shape = shape.with_adapters(Adapters(3, tuple(targets or shape.matrix_names), norms=True))
    for index, (layer, trained) in enumerate(zip(model.model.layers, count.trained_by_layer(shape), strict=True)):
        assert trained == sum(p.numel() for p in layer.parameters() if p.requires_grad)
        frozen = sum(p.numel() for name, p in layer.named_parameters() if ".lora_" not in name)
        kind = shape.of_layer(index)
        assert kind.largest_layer == frozen
        is_dense = hasattr(layer.mlp, "gate_proj")
        assert (kind.is_mixture, kind.intermediate) == ((False, 80) if is_dense else (True, 24))
    assert count.trained_parameters(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.trained_in_layer(shape) == max(count.trained_by_layer(shape))


def adapted_model(config, targets, whole):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        names = linear_names(model)
        assert names == sorted(MemoryShape.from_config(config).matrix_names)
        put_lora(model, LoraConfig(r=3, target_modules=targets or names), seed=0)
        train_whole(model, whole, None)
    return model


def test_a_dense_layer_is_wider_than_the_experts_of_a_token():
    config = tiny_config("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1], intermediate_size=4800)
    shape, setting = MemoryShape.from_config(config), Setting(4096, "one process")
    everything = Choices.alike(4, LayerChoice(everything=True))
    of_dense, of_mixture = (Kept(shape, setting, everything).on_gpu[index] for index in (1, 2))
    assert of_dense - of_mixture > 4096 * 3 * 2 * (4800 - 2 * 24)
    moments = predict(shape, setting, Choices.alike(4)).moments
    assert moments["backward of layer 1"] > max(moments[f"backward of layer {index}"] for index in (0, 2, 3))
    dense = tiny_config("qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0, 1])
    assert not MemoryShape.from_config(dense).is_mixture


def test_half_of_what_experts_hold_as_one_is_refused():
    class Config:
        model, lora_r, lora_targets, lora_train = "a-model", 8, ["q_proj", "up_proj"], []
        quantize, double_quant = None, True

    with pytest.raises(ValueError, match=r"--lora-targets has up_proj, one of the two.*name gate_proj and up_proj"):
        count.adapters_of_run(Config, MemoryShape.from_config(tiny_config("qwen3_moe")))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_of_nf4_are_those_of_bitsandbytes(double_quant):
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(512, 512), requires_grad=False, compress_statistics=double_quant, quant_type="nf4")
    weight = weight.to("cpu")
    state = weight.quant_state
    held = [weight.data, state.absmax, *([state.state2.absmax] if double_quant else [])]
    size = sum(t.numel() * t.element_size() for t in held)
    assert size / 512**2 == pytest.approx(count.bytes_of_nf4(double_quant), rel=1e-4)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW"])
def test_optimizer_state_is_counted(kind):
    from bitsandbytes import optim

    weight = torch.nn.Parameter(torch.randn(128, 512))
    weight.sum().backward()
    optimizer = getattr(optim, kind)([weight])
    optimizer.step()
    # The table of what each byte stands for is shared by all.
    held = [t for name, t in optimizer.state[weight].items() if torch.is_tensor(t) and not name.startswith("qmap")]
    size = sum(t.numel() * t.element_size() for t in held)
    name = {"AdamW8bit": "adamw_8bit", "AdamW": "adamw"}[kind]
    shape = replace(SHAPE, layer_parameters=weight.numel(), outer_parameters=0)
    assert states(shape, Setting(1, "one process", optimizer=name))[2] == pytest.approx(size, rel=1e-3)


SHAPE = MemoryShape.from_config(load_shape_config("llama-2-7b")[0])
LORA = SHAPE.with_adapters(Adapters(32, SHAPE.matrix_names))
QLORA = SHAPE.with_adapters(Adapters(32, SHAPE.matrix_names, quantize="nf4"))
ALONE = Setting(102_400, "one process", weight_bytes=2)


def test_published_sizes_of_llama_2_7b():
    """16 bytes a parameter all trained; 2 frozen; about half a byte in 4 bits, beside embedding and head."""
    full = sum(states(SHAPE, replace(ALONE, weight_bytes=4)))
    assert full == 16 * SHAPE.parameters
    assert count.trained_parameters(LORA) == 79_953_920
    assert sum(states(LORA, ALONE)) == 2 * SHAPE.parameters + 16 * count.trained_parameters(LORA)
    assert states(QLORA, ALONE)[0] / GIB == pytest.approx(3.9, abs=0.1)


def test_paged_state_is_the_hosts():
    choices = Choices.alike(32)
    plain, paged = (predict(LORA, replace(ALONE, optimizer=name), choices) for name in ("adamw", "paged_adamw"))
    moved = plain.gpu["optimizer state"]
    assert plain.gpu_peak - paged.gpu_peak == moved > 0
    assert paged.host_peak - plain.host_peak == moved


def test_one_h200_holds_a_million_tokens():
    budget = Budget(134 * GIB, 118 * GIB)
    assert longest_that_fits(LORA, ALONE, budget, Wishes()) > 1 << 20
    length = 102_400
    kept = decide(LORA, ALONE, budget, Wishes(), length).choices.layers
    assert all(layer.attention == "gpu" or layer.everything for layer in kept)


def test_frozen_weights_save_their_gradients_time():
    step = Step(LORA, 102_400, Cluster.of(DEVICES["h200"], 1, 1), "data_parallel", Choices.alike(32), "ddp")
    matrices = sum(m.inputs * m.outputs for m in SHAPE.matrices) * 32 + SHAPE.vocab * SHAPE.hidden
    kept_all = replace(step, choices=Choices.alike(32, LayerChoice(everything=True)))
    of_adapters = 6 * 32 * count.adapter_parameters(LORA)
    assert matrix_flops(kept_all) == (4 * matrices + of_adapters) * 102_400
    assert step_cost(step).seconds < step_cost(replace(step, model=SHAPE)).seconds
    assert step_cost(replace(step, model=QLORA)).seconds > step_cost(step).seconds


def test_targets_that_a_layer_has_not_are_refused():
    class Config:
        lora_r, lora_targets, lora_train, quantize, double_quant = 8, ["q_proj", "fc1"], [], None, True

    with pytest.raises(ValueError, match=r"--lora-targets fc1 .*q_proj"):
        count.adapters_of_run(Config, SHAPE)


def test_benchmark_runs_some_layers_with_the_memory_of_all(monkeypatch, tmp_path):
    """The last two of four layers run; the pool and ballast hold what the policy decided for four."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import lora_step

    command = "--model tiny --lora-r 4 --quantize nf4 --layers 1 --seq-lengths 128 --warmup-length 32"
    flags = "--mlp-tile 64 --keep-inputs host --keep-attention host --checkpoint-every 2 --gpu-memory 1"
    monkeypatch.setattr(sys, "argv", ["lora_step.py", *command.split(), *flags.split(), "--output", str(tmp_path)])
    lora_step.main()
    [file] = tmp_path.iterdir()
    [row] = json.loads(file.read_text())["rows"]
    assert (row["layers_timed"], row["layers_accounted"]) == (2, 2)
    assert row["loss"] > 0
    assert row["grad_norm"] > 0
    assert row["seconds"] > row["seconds_timed"]
    a_layer = 128 * (4 * 64 + 4 * 64 + 4 * 4)  # attention's result in float32, and every second input
    assert row["ballast_host_gib"] * GIB == 2 * a_layer - 128 * 4 * 64
