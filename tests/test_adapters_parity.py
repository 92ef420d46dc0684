"""Adapters' gradients under sequence parallelism, engines and memory choices, against peft's layers in one process."""

import pytest
import torch
import torch._dynamo

from tests.adapter_jobs import AdapterStep
from tests.engine_jobs import ddp_step, fsdp2_step
from tests.test_engines import check
from tests.test_parity import SHARDED_MODES

LORA_TRAIN = ("embeddings", "norms")


@pytest.fixture(autouse=True)
def _compiling_is_as_before():
    """A job on 4-bit weights turns it off, and one process's part of it runs in this one."""
    with torch._dynamo.config.patch(disable=torch._dynamo.config.disable):
        yield


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_lora(ranks, mode):
    check(ranks, 4, ddp_step, AdapterStep(mode, 2, 2, fuses=True))


@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "ulysses_attn"])
@pytest.mark.parametrize("degree", [2, 4])
def test_lora_on_one_sequence(ranks, mode, degree):
    check(ranks, degree, ddp_step, AdapterStep(mode, degree, fuses=True))


@pytest.mark.parametrize("choices", ["on the host", "every third input", "some unchecked", "all"])
def test_lora_with_memory_choices(ranks, choices):
    """The embedding is frozen, so the first layer's input needs no gradient."""
    check(ranks, 2, ddp_step, AdapterStep("zigzag_ring_attn", 2, memory=choices, loss="tiled", fuses=True))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",)])
def test_some_layers_with_memory_choices(ranks, targets):
    """MLPs, or attentions, without anything that is trained."""
    check(
        ranks, 2, ddp_step, AdapterStep("zigzag_ring_attn", 2, memory="all", loss="tiled", targets=targets, fuses=True)
    )


@pytest.mark.parametrize(
    ("family", "job"), [("llama", ddp_step), ("qwen3", fsdp2_step), ("gemma2", fsdp2_step), ("phi3", ddp_step)]
)
def test_embeddings_and_norms(ranks, family, job):
    """gemma2's embedding is its head, too."""
    step = AdapterStep("zigzag_ring_attn", 2, 2, family=family, memory="all", loss="tiled", train=LORA_TRAIN)
    step.fuses = job is ddp_step
    check(ranks, 4, job, step)


@pytest.mark.parametrize("memory", [None, "all"])
def test_lora_under_fsdp2(ranks, memory):
    check(ranks, 4, fsdp2_step, AdapterStep("ulysses_attn", 2, 2, memory=memory, loss="tiled"))


@pytest.mark.parametrize(("mode", "degree"), [("zigzag_ring_attn", 2), ("zigzag_ring_attn", 4), ("ulysses_attn", 2)])
def test_4_bit_weights(ranks, mode, degree):
    check(ranks, degree, ddp_step, AdapterStep(mode, degree, 2, torch.float32, quantize="nf4", fuses=True))


@pytest.mark.parametrize("job", [ddp_step, fsdp2_step])
def test_4_bit_weights_with_memory_choices(ranks, job):
    step = AdapterStep("zigzag_ring_attn", 2, 1, torch.float32, quantize="nf4", memory="all", loss="tiled")
    step.fuses = job is ddp_step
    check(ranks, 2, job, step)
