"""Attention over tensors of more than 2^31 elements, as a million tokens of a 7B model on one GPU have them.

`EASYCTX_TEST_GPUS=0 bash tests/run.sh -m gpu tests/test_gpu_large.py`; 70 GB of GPU memory and a few seconds.
"""

import pytest
import torch

from easyctx.attention import Context, register_context, seq_parallel_attention
from easyctx.mesh import Mesh
from easyctx.modes import WHOLE_SEQUENCE

# Many heads of few tokens cross the border with little work: row times stride is what must not overflow.
LENGTH, HEADS, HEAD_DIM = 65_536, 264, 128


def attention(q, k, v, dout, groups=1):
    """out, dq, dk, dv."""
    number = register_context(Context(WHOLE_SEQUENCE, Mesh(), head_groups=groups))
    given = [t.requires_grad_() for t in (q, k, v)]
    out, _ = seq_parallel_attention(*given, None, HEAD_DIM**-0.5, 0.0, 0, 0, number)
    return out.detach(), *torch.autograd.grad(out, given, dout)


def last_heads_are_those_of_a_small_tensor(length, heads, device, dtype, groups):
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn((1, length, heads, HEAD_DIM), device=device, dtype=dtype) for _ in range(4))
    few = slice(heads - 2, heads)
    found = [t[:, :, few].clone() for t in attention(q, k, v, dout, groups)]
    small = [t.detach()[:, :, few].contiguous() for t in (q, k, v, dout)]
    for got, want in zip(found, attention(*small), strict=True):
        assert (got.double() - want.double()).norm() < 5e-3 * want.double().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; EASYCTX_TEST_GPUS names those to use")
@pytest.mark.parametrize("groups", [1, 8])
def test_more_than_2_to_the_31_elements(groups):
    assert LENGTH * HEADS * HEAD_DIM > 1 << 31
    if torch.cuda.mem_get_info()[0] < 80 << 30:
        pytest.skip("needs 80 GiB of free GPU memory")
    last_heads_are_those_of_a_small_tensor(LENGTH, HEADS, "cuda", torch.bfloat16, groups)


def test_the_same_with_few_elements():
    last_heads_are_those_of_a_small_tensor(48, 8, "cpu", torch.float32, 4)
