"""Muon's state and working set are counted as they are, and its time; a step with it fits where the count says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from easyctx.cost.hardware import DEVICES, Cluster
from easyctx.cost.models import load_shape_config
from easyctx.cost.step import Step, optimizer_seconds
from easyctx.memory.budget import Choices, MemoryShape, Setting, predict, states
from easyctx.memory.engines import muon_step_bytes
from easyctx.training.optimizer import make_optimizer
from tests.live_memory import peak_of
from tests.models import FAMILY_EXTRAS, VOCAB, tiny_model

SETTINGS = {"learning_rate": 1e-3, "adam_betas": [0.9, 0.95], "weight_decay": 0.1}
LLAMA = MemoryShape.from_config(load_shape_config("llama-2-7b")[0])


def held_by(family, name):
    """A tiny model's sizes, and the bytes of its optimizer's state after a step."""
    model = tiny_model(family, torch.float32, use_cache=False)
    optimizer = make_optimizer(model, SimpleNamespace(optimizer=name, **SETTINGS))
    ids = torch.randint(3, VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tensors = [t for of in optimizer.state.values() for key, t in of.items() if key != "step"]
    return MemoryShape.from_config(model.config), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("family", FAMILY_EXTRAS)
def test_state_is_counted_exactly(family):
    shape, held = held_by(family, "muon")
    for engine in ("one process", "ddp"):
        assert states(shape, Setting(1, engine, optimizer="muon"))[2] == held


def test_muon_holds_half_of_what_adamw_holds_of_matrices():
    shape, held = held_by("llama", "adamw")
    assert states(shape, Setting(1, "ddp"))[2] == held
    assert held - held_by("llama", "muon")[1] == 4 * shape.matrix_parameters


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 96), (96, 64), (80, 80)])
def test_working_set_of_a_matrix(outputs, inputs):
    weight = torch.nn.Parameter(torch.randn(outputs, inputs))
    weight.grad = torch.randn(outputs, inputs)
    optimizer = torch.optim.Muon([weight], adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    there = [weight, weight.grad, optimizer.state[weight]["momentum_buffer"]]
    assert peak_of(optimizer.step, there) == pytest.approx(muon_step_bytes(inputs, outputs, 4), rel=1e-3)


def test_a_step_counts_the_largest_matrix():
    setting = Setting(64, "ddp", optimizer="muon")
    moments = [
        predict(LLAMA, replace(setting, optimizer=name), Choices.alike(32)).moments for name in ("muon", "adamw")
    ]
    of_muon, of_adamw = (found["optimizer"] for found in moments)
    assert of_muon - of_adamw == muon_step_bytes(4096, 11008, 4) - 4 * LLAMA.matrix_parameters


def test_seconds():
    step = Step(LLAMA, 8192, Cluster.of(DEVICES["h200"], 1, 1), "data_parallel", Choices.alike(32), "ddp")
    adamw, muon, small = (optimizer_seconds(replace(step, optimizer=name)) for name in ("adamw", "muon", "adamw_8bit"))
    # Five rounds of two products with, and one of, a square of the shorter side: 4096.
    flops = 5 * 32 * (4 * (4 + 2) * 4096**3 + 3 * (4 * 4096**2 * 11008 + 2 * 4096**3))
    assert muon > flops / DEVICES["h200"].dense_flops > adamw > small > 0
