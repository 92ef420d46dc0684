"""The policy: what it keeps as memory shrinks, that its choices fit, what it refuses, and what it reads of the host."""

from dataclasses import replace

import pytest
import torch

from easyctx.memory import host
from easyctx.memory.budget import Choices, LayerChoice, MemoryShape, Setting, predict
from easyctx.memory.describe import OutOfMemory, describe, explained, why_not
from easyctx.memory.policy import Budget, Decision, DoesNotFit, Wishes, decide, longest_that_fits
from easyctx.memory.pool import HostPool
from easyctx.memory.spill import Spill
from tests.test_memory_budget import GIB, LLAMA_3_8B

SHAPE = MemoryShape.from_config(LLAMA_3_8B)
H200 = Budget(132 * GIB, 240 * GIB)


def on_two(length, **changes):
    return Setting(length // 2, "fsdp2", ranks=2, local_ranks=2, ring=2, **changes)


def decided(length, budget=H200, wishes=None):
    found = decide(SHAPE, on_two(length), budget, wishes or Wishes(), length)
    assert found.predicted.gpu_peak <= budget.gpu
    assert found.predicted.host_peak <= budget.host
    assert found.predicted == predict(SHAPE, on_two(length), found.choices)
    return found


def test_short_sequences_keep_whole_layers_and_long_ones_go_to_the_host():
    short = decided(65_536).choices
    assert any(layer.everything for layer in short.layers)
    assert all(layer.everything or layer == LayerChoice("gpu", "gpu") for layer in short.layers)
    long = decided(1_048_576).choices
    assert any(layer.attention == "host" for layer in long.layers)
    assert any(layer.inputs == "recompute" for layer in long.layers)
    assert long.mlp_tile
    kept = sum(layer.attention != "recompute" for layer in long.layers)
    assert kept >= 16, "attention is what costs at this length, and half of it has room"


def test_room_is_left_to_gradients_in_memory_of_their_own_where_that_costs_little():
    gradients = 4 * SHAPE.parameters // 2
    for length in (65_536, 131_072):
        found = decided(length)
        assert found.left_free == pytest.approx(gradients, rel=0.01)
        assert found.predicted.gpu_peak + found.left_free <= H200.gpu
        assert any("are left to gradients" in line for line in describe(found, H200))
    long = decided(1_048_576)
    assert long.left_free == 0, "attention would be computed again"
    assert long.predicted.gpu_peak + gradients > H200.gpu
    assert decided(8_192).left_free == 0, "both fit, and nothing was decided"
    for other in (replace(on_two(65_536), engine="zero3"), on_two(65_536, accumulates=True)):
        assert decide(SHAPE, other, H200, Wishes(), 65_536).left_free == 0


def test_less_host_memory_keeps_less():
    def kept(host_gib):
        choices = decided(524_288, Budget(H200.gpu, host_gib * GIB)).choices
        return sum(layer.attention != "recompute" for layer in choices.layers)

    assert kept(240) == 32
    assert kept(20) < 32


def test_offloaded_weights_are_pinned_where_that_fits():
    """16 bytes a parameter and the process are 123.7 GiB; weights and gradients, pinned, are 6.2 GiB more."""
    setting, length = Setting(524_288, "fsdp2_offload"), 524_288

    def decided_with(host_gib):
        return decide(SHAPE, setting, Budget(134 * GIB, host_gib * GIB), Wishes(), length)

    roomy, tight = decided_with(135), decided_with(128)
    assert roomy.pins
    assert "rounding of pinned memory" in roomy.predicted.host
    assert not tight.pins
    assert tight.predicted.host_peak <= 128 * GIB
    assert any("not pinned" in line for line in describe(tight, Budget(134 * GIB, 128 * GIB)))
    with pytest.raises(DoesNotFit) as refused:
        decided_with(123)
    assert refused.value.best.predicted.host_peak == tight.predicted.host["processes"] + 16 * SHAPE.parameters


def test_wishes_are_honoured():
    wishes = Wishes(inputs="host", attention="host", every=2, mlp_tile=4096, tiled_norms=True, head_groups=4)
    choices = decided(131_072, wishes=wishes).choices
    assert (choices.mlp_tile, choices.tiled_norms, choices.head_groups) == (4096, True, 4)
    assert [layer.inputs for layer in choices.layers] == ["host", "recompute"] * 16
    assert {layer.attention for layer in choices.layers} == {"host"}
    assert all(layer.everything for layer in decided(16_384, wishes=Wishes(everything=True)).choices.layers)
    again = decided(131_072, wishes=Wishes(attention="recompute")).choices
    assert {layer.attention for layer in again.layers} == {"recompute"}


def test_what_does_not_fit_is_refused_with_the_longest_length_that_does():
    small, wishes, length = Budget(75 * GIB, 32 * GIB), Wishes(), 1_048_576
    with pytest.raises(DoesNotFit) as refused:
        decide(SHAPE, on_two(length), small, wishes, length)
    longest = longest_that_fits(SHAPE, on_two(length), small, wishes)
    assert 0 < longest < length // 2
    decide(SHAPE, on_two(2 * longest), small, wishes, 2 * longest)
    with pytest.raises(DoesNotFit):
        decide(SHAPE, on_two(2 * longest + 4096), small, wishes, 2 * longest + 4096)
    said = why_not(refused.value.best, small, length // 2, 2 * longest, length, 2)
    assert f"--seq-length {2 * longest}" in said
    assert "of GPU memory are needed and 75.0 are there" in said


def test_running_out_of_memory_says_what_to_turn():
    choices = Choices.alike(32)
    decision = Decision(choices, predict(SHAPE, on_two(65_536), choices))
    assert "of 32 layers 32 x input and attention's result on the GPU" in describe(decision, H200)[0]
    said = r"(?s)Predicted were .* GiB a GPU .*--gpu-memory 119 .*--mlp-tile 8192"
    with pytest.raises(OutOfMemory, match=said), explained(decision, H200):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory, match=r"(?s)host pool of .*--host-memory 216"), explained(decision, H200):
        HostPool(1 << 12, pin=False, block=1 << 12).take(1 << 13)
    with pytest.raises(torch.OutOfMemoryError), explained(None, None):
        raise torch.OutOfMemoryError("not planned for")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 64 GiB, 40 of them available, and no container; the folder of its control groups."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    kib = GIB // 1024
    (proc / "meminfo").write_text(f"MemTotal: {64 * kib} kB\nMemFree: {kib} kB\nMemAvailable: {40 * kib} kB\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(host, "_PROC", proc)
    monkeypatch.setattr(host, "_CGROUP", groups)
    return groups


def test_host_memory_without_a_limit_is_what_is_available(machine):
    assert host.available_host_memory() == 40 * GIB
    assert 38 * GIB < host.usable_host_memory() < 39 * GIB  # some of it is not planned with
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("5\n")
    assert host.available_host_memory() == 40 * GIB


def test_host_memory_heeds_a_container(machine):
    """The limit may stand on any group above this process; files it caches do not count."""
    (machine / "job").mkdir()
    (machine / "job" / "memory.max").write_text(f"{20 * GIB}\n")
    (machine / "job" / "memory.current").write_text(f"{8 * GIB}\n")
    (machine / "job" / "memory.stat").write_text(f"anon 1\ninactive_file {3 * GIB}\n")
    assert host.available_host_memory() == 15 * GIB


def test_host_memory_believes_a_limit_above_the_total(machine):
    """A machine that is given memory as it uses it: its total is not what it can have."""
    (machine / "memory").mkdir()
    (machine / "memory" / "memory.limit_in_bytes").write_text(f"{128 * GIB}\n")
    (machine / "memory" / "memory.usage_in_bytes").write_text(f"{10 * GIB}\n")
    assert host.available_host_memory() == 118 * GIB


def test_a_full_pool_says_so_and_loses_nothing():
    pool = HostPool(5 << 12, pin=False, block=1 << 12)
    assert pool.capacity == 5 << 12 or pool.capacity == 8 << 12
    first = pool.take(3 << 12)
    with pytest.raises(MemoryError, match="are to be kept"):
        pool.take(6 << 12)
    pool.give_back(first)
    assert pool.used == 0
    assert len(pool.take(pool.capacity)) == pool.capacity >> 12


def test_spilled_tensors_come_back_as_they_were():
    spill = Spill(HostPool(1 << 20, pin=False, block=1 << 10), torch.device("cpu"))
    tensors = [torch.randn(3, 700), torch.randn(0, 4), torch.randn(5, 7).bfloat16().t(), torch.arange(1000)]
    handles = [spill.put(tensor, layer) for layer, tensor in enumerate(tensors)]
    for tensor, handle in zip(tensors, handles, strict=True):
        want = tensor.clone()
        tensor.zero_()
        spill.prefetch(handle)
        assert torch.equal(spill.get(handle, keep=True), want)
        assert torch.equal(spill.get(handle), want)
    assert spill.pool.used == 0
