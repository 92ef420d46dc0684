"""Predicted peaks against what tensors are really alive in a step, choice by choice."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from easyctx import head, tiled_loss
from easyctx.adapters.fused import fuse_lora
from easyctx.adapters.inject import put_lora, set_adapter_dtype, train_whole
from easyctx.kernel.torch_cpu import TorchCpu
from easyctx.memory import install, loss, working_set
from easyctx.memory.adapters import Adapters
from easyctx.memory.budget import Choices, LayerChoice, MemoryShape, Setting, Widths, predict
from easyctx.memory.install import apply_choices
from easyctx.memory.pool import HostPool
from easyctx.memory.spill import Spill
from easyctx.patch import use_own_attention
from easyctx.training.objective import token_loss
from tests.live_memory import peak_of

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from shared_parts.random_models import quantise_layers

LAYERS, TOKENS = 4, 1024
CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=448,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=64,
    use_cache=False,
)
# A dense layer among those with experts.
MIXED = Qwen3MoeConfig(
    hidden_size=128,
    intermediate_size=448,
    moe_intermediate_size=96,
    num_experts=16,
    num_experts_per_tok=2,
    num_hidden_layers=LAYERS,
    mlp_only_layers=[1],
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    use_cache=False,
)
WHOLE, KEPT, AGAIN = LayerChoice(everything=True), LayerChoice("gpu", "gpu"), LayerChoice("gpu", "recompute")
CASES = {
    "everything": Choices.alike(LAYERS, WHOLE),
    "everything but the MLP": Choices.alike(LAYERS, WHOLE, mlp_tile=64),
    "nor the norms": Choices.alike(LAYERS, WHOLE, mlp_tile=64, tiled_norms=True),
    "inputs and attention": Choices.alike(LAYERS, KEPT),
    "inputs": Choices.alike(LAYERS, AGAIN),
    "on the host": Choices.alike(LAYERS, LayerChoice("host", "host")),
    "tiled": Choices.alike(LAYERS, KEPT, mlp_tile=64, tiled_norms=True),
    "every third input": Choices.alike(LAYERS, KEPT, every=3, mlp_tile=64, tiled_norms=True),
}


# Weights' dtype, widths, and whether autocast runs over the weights: one process in float32, a sharding engine's
# half precision, DDP's.
FLOAT32, HALF, AUTOCAST = (
    (torch.float32, Widths(4, 4), False),
    (torch.bfloat16, Widths(2, 2), False),
    (torch.float32, Widths(2, 4), True),
)
RUNS = {
    **{f"{name}, float32": (FLOAT32, choices) for name, choices in CASES.items()},
    **{f"{name}, bfloat16": (HALF, choices) for name, choices in CASES.items()},
    **{f"{name}, autocast": (AUTOCAST, choices) for name, choices in CASES.items()},
}
# Frozen weights in half precision, adapters in float32 under autocast.
LORA = (torch.bfloat16, Widths(2, 2), True)
EVERY_MATRIX = MemoryShape.from_config(CONFIG).matrix_names
ADAPTERS = {
    "LoRA": Adapters(8, EVERY_MATRIX),
    "LoRA on q and v, norms trained": Adapters(8, ("q_proj", "v_proj"), norms=True),
    "QLoRA": Adapters(8, EVERY_MATRIX, quantize="nf4"),
}
OF_ADAPTERS = {
    f"{name}, {kind}": (CASES[name], adapters)
    for kind, adapters in ADAPTERS.items()
    for name in (("everything", "inputs and attention", "tiled") if kind == "LoRA" else ("tiled",))
}


@pytest.fixture
def _light(monkeypatch):
    """Norms in tiles that 1,024 tokens have; attention without its arithmetic, of which memory knows nothing."""

    def forward(self, q_BSHD, k_BSKD, v_BSKD, band, score):
        batch, length, heads, _ = q_BSHD.shape
        return torch.zeros_like(q_BSHD), q_BSHD.new_zeros((batch, heads, length), dtype=torch.float32)

    def backward(self, dout_BSHD, saved, band, score):
        return tuple(torch.zeros_like(tensor) for tensor in saved[:3])

    monkeypatch.setattr(TorchCpu, "forward", forward)
    monkeypatch.setattr(TorchCpu, "backward", backward)
    monkeypatch.setattr(install, "NORM_TILE", 64)
    monkeypatch.setattr(working_set, "attention_inside", lambda *_: 0)  # an operator's inside is not seen


@pytest.mark.usefixtures("_light")
@pytest.mark.parametrize("name", RUNS)
def test_peak(name):
    (dtype, widths, autocast), choices = RUNS[name]
    hold_against(dtype, widths, autocast, choices, None)


@pytest.mark.usefixtures("_light")
@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_peak_beside_frozen_weights(name):
    choices, adapters = OF_ADAPTERS[name]
    hold_against(*LORA, choices, adapters)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
@pytest.mark.parametrize("targets", [EVERY_MATRIX, ("q_proj", "k_proj", "v_proj", "o_proj")])
@pytest.mark.parametrize("name", ["everything", "inputs and attention"])
def test_peak_of_layers_that_differ(monkeypatch, name, targets):
    """Adapters of the MLP's matrices are the experts', which are made anew with these in each forward."""
    monkeypatch.setattr(working_set, "attention_inside", lambda *_: 0)
    hold_against(*LORA, CASES[name], Adapters(8, targets), config=MIXED, within=0.1)


def put_adapters(model, adapters):
    if adapters.quantize:
        quantise_layers(model, torch.bfloat16, adapters.double_quant)
    put_lora(model, LoraConfig(r=adapters.rank, target_modules=list(adapters.targets)), seed=0)
    set_adapter_dtype(model, torch.float32, casts_inputs=False)
    train_whole(model, ("norms",) * adapters.norms, torch.float32)
    fuse_lora(model)


def hold_against(dtype, widths, autocast, choices, adapters, config=CONFIG, within=0.08):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if adapters is not None:
        put_adapters(model, adapters)
    use_own_attention(model)
    pool = HostPool(1 << 24, pin=False, block=1 << 14)
    apply_choices(model, choices, Spill(pool, torch.device("cpu")))
    ids = torch.randint(0, 64, (1, TOKENS))

    def step():
        with torch.autocast("cpu", torch.bfloat16, autocast):
            loss, _ = token_loss(model, {"input_ids": ids}, ids, "tiled")
        (loss / TOKENS).backward()

    got = peak_of(step, [*model.parameters(), *pool.slabs])
    of_weights = {"widths": widths, "weight_bytes": dtype.itemsize}
    setting = Setting(TOKENS, "one process", kernel="torch_cpu", fused_loss=False, **of_weights)
    predicted = predict(MemoryShape.from_config(config).with_adapters(adapters), setting, choices)
    there = predicted.gpu["weights"] + predicted.gpu["optimizer state"]
    want = max(size for moment, size in predicted.moments.items() if moment != "optimizer") - there
    assert got == pytest.approx(want, rel=within), (
        f"{got / 2**20:.2f} MiB, predicted {want / 2**20:.2f}: {predicted.gpu}"
    )


@pytest.mark.parametrize("trains_head", [True, False])
@pytest.mark.parametrize("vocab", [64, 4096])
def test_peak_of_a_fused_loss(monkeypatch, vocab, trains_head):
    """As on a GPU, with a stand-in for its kernel: in place, as are sums of the head's gradient."""
    monkeypatch.setattr(head, "TILE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(loss, "LOSS_TILE", 1 << 16)
    monkeypatch.setattr(tiled_loss, "_is_fused", lambda hidden: True)
    monkeypatch.setattr(tiled_loss, "_add_product", lambda total, left, right: None)
    fused = SimpleNamespace(loss_and_gradient_=lambda logits, targets, cap: torch.zeros(len(logits)))
    monkeypatch.setitem(sys.modules, "easyctx.tiled_loss_cuda", fused)
    tokens, width = 2048, 32
    hidden = torch.zeros(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(vocab, width, dtype=torch.bfloat16, requires_grad=trains_head)
    targets = torch.zeros(tokens, dtype=torch.int64)

    def step():
        torch.autograd.grad(tiled_loss._TiledCrossEntropy.apply(hidden, weight, targets, None), hidden)

    shape = SimpleNamespace(vocab=vocab, hidden=width, trains_head=trains_head)
    want = loss.tiled_loss(shape, Widths(2, 2), tokens, on_gpu=True)
    assert peak_of(step, [hidden, weight, targets]) == pytest.approx(want, rel=0.08)


def test_tiles_of_the_loss_are_as_large_as_predicted():
    assert (loss.LOSS_TILE, loss.FUSED_TILES) == (head.TILE_ELEMENTS, tiled_loss.MORE_WHERE_FUSED)
