"""From a run's flags to its memory: what reaches the model, and families that nobody planned for."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GPT2Config

from easyctx.kernel import KERNELS
from easyctx.mesh import Mesh
from easyctx.training.flags import parse_arguments
from easyctx.training.memory import decide_memory, recomputes_without_plan
from easyctx.training.model import check_kernel, patch_model
from tests.models import tiny_config, tiny_model

GPT2 = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61)
ON_GPU = torch.device("cuda")


def config_of(*flags):
    return parse_arguments(["--model", "m", "--dataset", "d", "--output-dir", "o", "--seq-length", "128", *flags])


def accelerator_on(device):
    """One process, as far as a decision asks."""
    real = Accelerator(cpu=True)
    return SimpleNamespace(device=device, mixed_precision="no", distributed_type=real.distributed_type, num_processes=1)


def decide(model_config, *flags):
    return decide_memory(config_of(*flags), model_config, accelerator_on(torch.device("cpu")), Mesh())


def test_without_a_gpu_and_without_a_flag_the_model_stays_as_it_is():
    assert decide(tiny_config("llama")) is None
    assert decide(tiny_config("llama"), "--memory", "off") is None


@pytest.mark.parametrize(
    ("flags", "everything", "attention", "own"),
    [
        (("--recompute", "none"), True, None, False),
        (("--recompute", "all"), False, "recompute", False),
        (("--recompute", "keep-attention"), False, "gpu", True),
        (("--keep-attention", "host"), False, "host", True),
    ],
)
def test_the_flags_of_before_still_mean_what_they_did(flags, everything, attention, own):
    memory = decide(tiny_config("llama"), *flags)
    assert {layer.everything for layer in memory.decision.choices.layers} == {everything}
    if attention:
        assert {layer.attention for layer in memory.decision.choices.layers} == {attention}
    assert memory.own_attention == own


def test_a_named_kernel_is_run_without_a_gpu_too(monkeypatch):
    """float64 through data_parallel with the reference kernel: every layer's attention is its."""
    calls, original = [], KERNELS["reference"].forward
    monkeypatch.setattr(KERNELS["reference"], "forward", lambda *given: calls.append(1) or original(*given))
    accelerator, model = accelerator_on(torch.device("cpu")), tiny_model("llama", torch.float64).eval()
    ids = torch.randint(3, 60, (1, 50))
    want = model(ids).logits
    for kernel, count in (("auto", 0), ("reference", len(model.model.layers))):
        config = config_of("--attn-kernel", kernel)
        patch_model(model, config, decide_memory(config, model.config, accelerator, Mesh()), accelerator, Mesh())
        torch.testing.assert_close(model(ids).logits, want)
        assert len(calls) == count


@pytest.mark.parametrize(
    ("model_config", "kernel", "says"),
    [
        (tiny_config("llama"), "cudnn", "runs on CUDA only, not on cpu"),
        (GPT2, "reference", "model family 'gpt2'"),
    ],
)
def test_a_kernel_that_cannot_be_used_is_refused(model_config, kernel, says):
    with pytest.raises(ValueError, match=says):
        check_kernel(config_of("--attn-kernel", kernel), model_config, accelerator_on(torch.device("cpu")))
    check_kernel(config_of(), model_config, accelerator_on(torch.device("cpu")))


def test_a_decision_reaches_the_model_and_another_replaces_it():
    accelerator, model = accelerator_on(torch.device("cpu")), tiny_model("llama", torch.float32)
    for flags, groups in ((("--keep-inputs", "host", "--head-groups", "2"), 2), (("--recompute", "all"), 1)):
        config = config_of(*flags)
        memory = decide_memory(config, model.config, accelerator, Mesh())
        patch_model(model, config, memory, accelerator, Mesh())
        assert model.easyctx_plan.choices == memory.decision.choices
        assert memory.decision.choices.head_groups == groups
        spill = model.easyctx_plan.layers[0].spill
        assert (spill is not None) == (groups == 2)
        model.train()(torch.randint(3, 60, (1, 128))).logits.sum().backward()
        if spill is not None:
            assert spill.pool.most_used == spill.pool.capacity, "the pool is as large as what it holds"


def test_a_family_that_is_not_planned_for_has_transformers_checkpoints():
    assert decide(GPT2, "--recompute", "all") is None
    with pytest.raises(ValueError, match="this model is gpt2: .* --recompute all and --recompute none"):
        decide(GPT2, "--mlp-tile", "64")
    assert recomputes_without_plan(config_of(), GPT2, ON_GPU)
    assert not recomputes_without_plan(config_of(), GPT2, torch.device("cpu"))
    assert not recomputes_without_plan(config_of("--recompute", "none"), GPT2, ON_GPU)
    assert not recomputes_without_plan(config_of(), tiny_config("llama"), ON_GPU)
    model = AutoModelForCausalLM.from_config(GPT2)
    patch_model(model, config_of("--recompute", "all"), None, accelerator_on(torch.device("cpu")), Mesh())
    assert model.is_gradient_checkpointing
