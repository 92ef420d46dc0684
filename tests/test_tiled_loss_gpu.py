"""The fused tile of the loss on a GPU: `EASYCTX_TEST_GPUS=0 bash tests/run.sh -m gpu`."""

import pytest
import torch

from easyctx.inputs import IGNORE_INDEX
from easyctx.tiled_loss import _TiledCrossEntropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; EASYCTX_TEST_GPUS names those to use"),
]


def loss_and_gradients(hidden, weight, targets, softcap):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = _TiledCrossEntropy.apply(hidden, weight, targets, softcap)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.25, device="cuda").to(loss.dtype))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocab", [37, 5000, 50257])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=str)
def test_as_the_unfused_one_in_float64(dtype, tolerance, vocab, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(6001, 64, device="cuda").to(dtype)
    weight = (torch.randn(vocab, 64, device="cuda") / 4).to(dtype)
    targets = torch.randint(0, vocab, (6001,), device="cuda")
    targets[::7] = IGNORE_INDEX
    targets[:2] = torch.tensor([0, vocab - 1])
    want = loss_and_gradients(hidden.double(), weight.double(), targets, softcap)
    got = loss_and_gradients(hidden, weight, targets, softcap)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() < tolerance * w.norm()
    assert not got[1][::7][1:].any()


def test_a_loss_that_is_not_finite_is_not_hidden():
    hidden, weight = torch.ones(4, 8, device="cuda"), torch.ones(20, 8, device="cuda")
    hidden[1, 1] = float("nan")
    loss, *_ = loss_and_gradients(hidden, weight, torch.arange(4, device="cuda"), None)
    assert loss.isnan()
