"""Muon for the layers' matrices beside AdamW: who steps what, at which rate, and checkpoints of both."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType

from easyctx import train
from easyctx.adapters.settings import AdapterSettings, check_adapter_engine
from easyctx.training.optimizer import MUON_RATE, MuonAndAdamW, make_optimizer, set_learning_rate
from easyctx.training.report import Reporter
from tests.models import VOCAB, tiny_model
from tests.optimizer_jobs import muon_steps
from tests.train_helpers import flags, make_inputs

SETTINGS = SimpleNamespace(optimizer="muon", learning_rate=1e-3, adam_betas=[0.9, 0.95], weight_decay=0.1)


def stepped(model: Any, optimizer: Any, steps: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_each_parameter_steps_as_in_its_own_optimizer() -> None:
    """Also through accelerate, which loads the state anew when it prepares an optimizer."""
    model, alone = (tiny_model("llama", torch.float32, use_cache=False) for _ in range(2))
    alone.load_state_dict(model.state_dict())
    prepared = Accelerator(cpu=True).prepare_optimizer(make_optimizer(model, SETTINGS), device_placement=True)
    set_learning_rate(prepared, 2e-3)
    matrices = [p for name, p in alone.named_parameters() if ".layers." in name and p.ndim == 2]
    others = [p for name, p in alone.named_parameters() if not (".layers." in name and p.ndim == 2)]
    assert len(matrices) == 7 * alone.config.num_hidden_layers
    muon = torch.optim.Muon(matrices, lr=MUON_RATE * 2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    both = SimpleNamespace(
        step=lambda: (muon.step(), adamw.step()), zero_grad=lambda: (muon.zero_grad(), adamw.zero_grad())
    )
    want, got = stepped(alone, both, 3), stepped(model, prepared, 3)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_loaded_state_is_gone_on_with() -> None:
    model = tiny_model("llama", torch.float32, use_cache=False)
    other = copy.deepcopy(model)
    optimizer, loaded = make_optimizer(model, SETTINGS), make_optimizer(other, SETTINGS)
    stepped(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    want, got = stepped(model, optimizer, 2), stepped(other, loaded, 2)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="--optimizer muon is for the linear layers of a decoder, and Linear has none"):
        make_optimizer(torch.nn.Linear(2, 2), SETTINGS)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    losses: dict[int, float] = {}
    original, killed_at = Reporter.step, [0]

    def step(reporter: Reporter, loss: float, grad_norm: float, rate: float) -> None:
        original(reporter, loss, grad_norm, rate)
        losses[reporter.progress.step] = loss
        if reporter.progress.step == killed_at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Reporter, "step", step)
    run = dict(optimizer="muon", max_train_steps=4, save_every=2, sync_save=True, gradient_accumulate_every=1)
    assert train.main(flags(inputs, tmp_path / "whole", **run)) == 0
    whole = dict(losses)
    killed_at[0] = 3
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(inputs, tmp_path / "out", **run))
    killed_at[0] = 0
    losses.clear()
    assert train.main(flags(inputs, tmp_path / "out", resume=True, **run)) == 0
    assert losses == {number: whole[number] for number in (3, 4)}


def test_ddp_ranks_step_alike_and_go_on_from_a_checkpoint(ranks: Any, tmp_path: Path) -> None:
    at_once = ranks(2).run(muon_steps, 0, 4, tmp_path)
    ranks(2).run(muon_steps, 0, 2, tmp_path)
    in_two = ranks(2).run(muon_steps, 2, 4, tmp_path)
    for name, tensor in at_once[0].items():
        assert all(torch.equal(tensor, other[name]) for other in (at_once[1], *in_two)), name


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_engines_with_sharded_matrices_are_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyctx.adapters.settings.engine_name", lambda accelerator: "the engine")
    accelerator: Any = SimpleNamespace(distributed_type=kind)
    with pytest.raises(ValueError, match=r"--optimizer muon does not go with the engine.*Muon needs a matrix whole"):
        check_adapter_engine(AdapterSettings(), "muon", accelerator)


def test_adapters_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(tmp_path)
    assert train.main(flags(inputs, tmp_path / "out", optimizer="muon", lora_r=4)) == 2
    assert "--optimizer muon is for whole matrices, and --lora-r is 4" in capsys.readouterr().err


def test_one_optimizer_has_the_groups_of_both() -> None:
    optimizer = make_optimizer(tiny_model("llama", torch.float32, use_cache=False), SETTINGS)
    assert isinstance(optimizer, MuonAndAdamW)
    set_learning_rate(optimizer, 4e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [MUON_RATE * 4e-3, 4e-3]
