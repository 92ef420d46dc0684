"""LoRA layers that add in place: outputs and gradients are those of peft's own layers."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from easyctx.adapters.fused import FusedLora, fuse_lora
from easyctx.adapters.inject import linear_names, put_lora, set_adapter_dtype
from easyctx.memory.budget import Choices
from easyctx.memory.install import apply_choices
from easyctx.patch import use_own_attention
from easyctx.training.objective import token_loss
from tests.models import tiny_config

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from shared_parts.random_models import quantise_layers


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=True), nn.Linear(20, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(dtype, dropout=0.0):
    """A model with peft's layers, and the same one fused."""
    torch.manual_seed(0)
    plain = Two().to(dtype)
    put_lora(plain, LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=["first", "second"]), 0)
    for name, p in plain.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn_like(p)  # B is zero as peft makes it
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 2
    return plain, fused


def results(model, x, autocast=False):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        out = model(x)
    out.float().square().sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_same_results_and_gradients():
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    plain, fused = pair(torch.float64)
    for got, want in zip(results(fused, x), results(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_same_within_rounding_under_autocast():
    x = torch.randn(2, 64, 12, dtype=torch.bfloat16)
    plain, fused = pair(torch.bfloat16)
    exact = results(copy.deepcopy(plain).double(), x.double())
    for model in (plain, fused):
        set_adapter_dtype(model, torch.float32, casts_inputs=False)
    found = zip(results(fused, x, autocast=True), results(plain, x, autocast=True), exact, strict=True)
    for got, before, want in found:
        errors = [(g.double() - want).norm() / want.norm() for g in (got, before)]
        assert errors[0] <= max(1.2 * errors[1], 2**-8), errors


@pytest.mark.parametrize("way", ["dropout", "disabled", "merged", "wider adapters"])
def test_peft_does_what_is_out_of_the_ordinary(way):
    plain, fused = pair(torch.float32, dropout=0.5 if way == "dropout" else 0.0)
    found = []
    for model in (plain, fused):
        if way == "wider adapters":
            model.first.base_layer.to(torch.bfloat16), model.second.base_layer.to(torch.bfloat16)
        if way == "disabled":
            model.first.enable_adapters(False)
        if way == "merged":
            model.second.merge()
        torch.manual_seed(1)
        x = torch.randn(4, 12, dtype=model.first.base_layer.weight.dtype)
        found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_adds_without_a_copy(monkeypatch):
    _, fused = pair(torch.float32)
    layer = fused.first
    assert isinstance(layer.forward, FusedLora)
    made = []
    base = layer.base_layer.forward
    monkeypatch.setattr(layer.base_layer, "forward", lambda x: made.append(base(x)) or made[-1])
    assert layer(torch.randn(4, 12)).data_ptr() == made[0].data_ptr()


@pytest.mark.parametrize("quantize", [False, True])
def test_same_in_layers_that_run_again_tile_by_tile(quantize):
    dtype = torch.float32 if quantize else torch.float64
    given = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for fuses in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=dtype).train()
        if quantize:
            quantise_layers(model, dtype, True)
        put_lora(model, LoraConfig(r=3, lora_alpha=7, target_modules=linear_names(model)), 0)
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.data = 0.1 * torch.randn_like(p)
        if fuses:
            assert fuse_lora(model)
            use_own_attention(model)
            layers = model.config.num_hidden_layers
            apply_choices(model, Choices.alike(layers, every=2, mlp_tile=16, tiled_norms=True))
        loss, _ = token_loss(model, {"input_ids": given}, given, "tiled")
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, want in zip(found[1], found[0], strict=True):
        assert (got - want).norm() <= (1e-5 if quantize else 1e-12) * want.norm()
