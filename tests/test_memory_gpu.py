"""Spilling beside the computation on a GPU. Start with EASYCTX_TEST_GPUS=0 pytest tests/test_memory_gpu.py."""

import pytest
import torch

from easyctx.loss import token_loss_sum
from easyctx.memory.pool import HostPool
from easyctx.memory.spill import Spill
from easyctx.patch import use_own_attention
from tests.memory_helpers import CHOICES
from tests.models import ragged_batch, tiny_model
from tests.parity import worst_gradient_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_nothing_is_overtaken_by_the_computation():
    """Sources are overwritten, and memory is used again, as soon as the computing stream is allowed to."""
    device = torch.device("cuda")
    spill = Spill(HostPool(1 << 28, pin=True), device)
    for _ in range(3):
        handles = []
        for layer in range(12):
            x = torch.full((1 << 22,), float(layer), device=device)
            handles.append(spill.put(x, layer))
            del x
            torch.randn(1 << 22, device=device).sin_()  # takes the memory that was just let go, if it may
        for layer in reversed(range(12)):
            if layer:
                spill.prefetch(handles[layer - 1])
            torch.randn(1 << 22, device=device).cos_()
            assert bool((spill.get(handles[layer]) == layer).all())
        assert spill.pool.used == 0


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_with_every_choice(name):
    from easyctx.memory.install import apply_choices

    def step(choices):
        model = tiny_model("llama", torch.bfloat16, use_cache=False, num_hidden_layers=4, head_dim=64).cuda().train()
        use_own_attention(model, head_groups=choices.head_groups if choices else 1)
        if choices:
            apply_choices(model, choices, Spill(HostPool(1 << 26, pin=True, block=1 << 14), torch.device("cuda")))
        ids, labels = (t.cuda() for t in ragged_batch(1, 512))
        token_loss_sum(model(ids).logits, labels).backward()
        return model

    assert worst_gradient_error(step(CHOICES[name](4)), step(None)) < 5e-2
