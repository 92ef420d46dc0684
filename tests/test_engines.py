"""A whole optimizer step under DDP and FSDP2, SP x DP, with accumulation, against one process."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from easyctx.engine import check_launch, refuse_second_source
from tests.engine_jobs import ddp_step, fsdp2_step
from tests.test_parity import SHARDED_MODES, check

CONFIGS = Path(__file__).parent.parent / "accelerate_configs"


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("world", "sp_degree"), [(2, 2), (4, 2), (4, 4)], ids=["sp2", "sp2xdp2", "sp4"])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_ddp(ranks, mode, world, sp_degree, accumulate):
    check(ranks(world).run(ddp_step, mode, sp_degree, accumulate, torch.float64), torch.float64)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_data_parallel(ranks, accumulate):
    check(ranks(2).run(ddp_step, "data_parallel", 1, accumulate, torch.float64), torch.float64)


def test_ddp_float32(ranks):
    check(ranks(4).run(ddp_step, "zigzag_ring_attn", 2, 3, torch.float32), torch.float32)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("world", "sp_degree"), [(2, 2), (4, 2)], ids=["sp2", "sp2xdp2"])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_fsdp2(ranks, mode, world, sp_degree, accumulate):
    check(ranks(world).run(fsdp2_step, mode, sp_degree, accumulate, torch.float64, False), torch.float64)


def test_fsdp2_offloaded(ranks):
    check(ranks(2).run(fsdp2_step, "zigzag_ring_attn", 2, 1, torch.float64, True), torch.float64)


def test_clipping_is_of_the_global_norm(ranks):
    """The whole gradient's norm is far above 0.1, so every weight's change is scaled down."""
    check(ranks(4).run(ddp_step, "zigzag_ring_attn", 2, 3, torch.float64, 0.1), torch.float64)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_leave_the_learning_rate_to_the_command_line(path):
    text = path.read_text()
    settings = yaml.safe_load(text)
    assert settings["num_processes"] >= 2
    flat = str(settings).lower()
    for word in ("lr", "learning_rate", "optimizer_type", "scheduler", "gradient_clipping", "gradient_accumulation"):
        assert f"'{word}" not in flat, f"{word} belongs to the command line"


def test_every_engine_has_a_configuration():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names >= {"cpu", "ddp", "zero3_offload", "zero3_inference", "fsdp2", "zero3_offload_2nodes"}


def test_a_second_source_of_the_learning_rate_is_refused():
    with pytest.raises(ValueError, match="section 'optimizer'.*remove the section"):
        refuse_second_source({"optimizer": {"params": {"lr": 1e-3}}})


def test_launches_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP2 through accelerate needs GPUs and 0 were found"):
        check_launch()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"not installed: pip install 'easyctx\[deepspeed\]'"):
        check_launch()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes were launched on this machine, which has 2 GPUs"):
        check_launch()
