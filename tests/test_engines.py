"""A whole optimizer step under DDP and FSDP2, SP x DP, with accumulation, against one process."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin

from easyctx.engine import check_launch, leave_unpinned, make_accelerator, offloads_to_host, refuse_second_source
from tests.engine_jobs import Step, ddp_step, fsdp2_step
from tests.test_parity import SHARDED_MODES, TOLERANCE

CONFIGS = Path(__file__).parent.parent / "accelerate_configs"


# How a step is spread over ranks and over accumulated batches.
SPREADS = pytest.mark.parametrize(
    ("world", "sp_degree", "accumulate"),
    [(2, 2, 3), (4, 2, 1), (4, 2, 3), (4, 4, 1)],
    ids=["sp2-3", "sp2xdp2-1", "sp2xdp2-3", "sp4-1"],
)


def check(ranks, world, job, step):
    if step.mode == "usp_attn":
        step.ring_degree = 2
    tolerance = TOLERANCE[step.dtype]
    for rank, found in enumerate(ranks(world).run(job, step)):
        for what, value in found.items():
            assert value < tolerance, f"rank {rank}: {what} differs by {value:.2e}"


@SPREADS
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_ddp(ranks, mode, world, sp_degree, accumulate):
    check(ranks, world, ddp_step, Step(mode, sp_degree, accumulate))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_data_parallel(ranks, accumulate, packed):
    check(ranks, 2, ddp_step, Step("data_parallel", 1, accumulate, packed=packed))


@pytest.mark.parametrize("job", [ddp_step, fsdp2_step])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_packed_documents(ranks, mode, job):
    check(ranks, 4, job, Step(mode, 2, 3, packed=True))


@pytest.mark.parametrize("mode", ["data_parallel", "zigzag_ring_attn", "ulysses_attn"])
def test_router_loss(ranks, mode):
    """A mixture of experts, with the auxiliary loss over the whole sequence and none of its padding."""
    check(ranks, 4, ddp_step, Step(mode, 1 if mode == "data_parallel" else 2, 3, family="mixtral"))


@pytest.mark.parametrize("job", [ddp_step, fsdp2_step])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tiled_loss(ranks, family, job):
    """gemma2: a cap on the logits, and a head that is the embedding."""
    check(ranks, 4, job, Step("zigzag_ring_attn", 2, 3, family=family, loss="tiled", packed=True))


def test_ddp_float32(ranks):
    check(ranks, 4, ddp_step, Step("zigzag_ring_attn", 2, 3, torch.float32))


@SPREADS
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_fsdp2(ranks, mode, world, sp_degree, accumulate):
    check(ranks, world, fsdp2_step, Step(mode, sp_degree, accumulate))


def test_fsdp2_offloaded(ranks):
    check(ranks, 2, fsdp2_step, Step("zigzag_ring_attn", 2, 3, offload=True))


@pytest.mark.parametrize("copies", [1, 2])
def test_gradients_that_are_summed_once_a_step(ranks, copies):
    """As in a loop of one's own, under accelerate's `no_sync`."""
    check(ranks, 4, fsdp2_step, Step("zigzag_ring_attn", 2, 3, copies=copies, sums_each=False))


@pytest.mark.parametrize("sp_degree", [2, 4])
def test_hsdp(ranks, sp_degree):
    """Two copies of the model on two ranks each; a sequence shared inside a copy, and by both."""
    check(ranks, 4, fsdp2_step, Step("zigzag_ring_attn", sp_degree, 3, copies=2))


def test_clipping_is_of_the_global_norm(ranks):
    """The whole gradient's norm is far above 0.1, so every weight's change is scaled down."""
    check(ranks, 4, ddp_step, Step("zigzag_ring_attn", 2, 3, max_norm=0.1))


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
    one_node = {"cpu", "ddp", "fsdp2", "fsdp2_offload", "zero3", "zero3_offload", "zero3_inference"}
    assert names >= one_node | {"fsdp2_2nodes", "hsdp_2nodes", "zero3_offload_2nodes"}


def test_offloaded_weights_can_be_left_unpinned():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True)
    assert plugin.cpu_offload.pin_memory
    leave_unpinned(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert offloads_to_host(plugin)
    assert not plugin.cpu_offload.pin_memory


@pytest.mark.parametrize("sharded", [False, True])
def test_fsdp2_sums_the_gradients_of_each_micro_batch(monkeypatch, sharded):
    """Until it does, every rank has them whole."""
    made = {}

    def accelerator(**settings):
        made.update(settings)
        return SimpleNamespace(distributed_type=None)

    monkeypatch.setattr("easyctx.engine.Accelerator", accelerator)
    monkeypatch.setattr("easyctx.engine.check_launch", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())
    make_accelerator(accumulate=3)
    plugin = made["gradient_accumulation_plugin"]
    assert (plugin.num_steps, plugin.sync_each_batch) == (3, sharded)


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


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("offloads", [False, True])
def test_an_fsdp_plugin_tells_whether_it_offloads(version, offloads):
    assert offloads_to_host(FullyShardedDataParallelPlugin(fsdp_version=version, cpu_offload=offloads)) == offloads
