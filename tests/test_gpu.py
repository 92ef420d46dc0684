"""Kernels on a GPU against float64: `EASYCTX_TEST_GPUS=0 bash tests/run.sh -m gpu`."""

import pytest
import torch

from easyctx.band import CAUSAL, FULL, Band, band_block
from easyctx.kernel import KERNELS, Saved, Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; EASYCTX_TEST_GPUS names those to use"),
]

BANDS = [(256, 256, CAUSAL), (256, 384, FULL), (384, 128, FULL), (256, 256, Band(-99, 0)), (256, 256, Band(low=57))]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_queries", "num_keys", "band"), BANDS, ids=str)
@pytest.mark.parametrize("name", ["flash4", "cudnn", "torch_flash"])
def test_against_float64(name, num_queries, num_keys, band, dtype, head_dim, heads):
    kernel = KERNELS[name]
    windowed = not (band.is_full or band.is_causal)
    if reason := kernel.refuses(Workload(torch.device("cuda"), dtype, head_dim, windowed)):
        pytest.skip(f"{name} {reason}")
    block = band_block(num_queries, num_keys, band)
    num_queries, num_keys, band = block.q.stop - block.q.start, block.k.stop - block.k.start, block.band
    shapes = [(2, n, h, head_dim) for n, h in ((num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]))]
    q, k, v = (torch.randn(s, device="cuda", dtype=dtype) for s in shapes)
    dout, scale = torch.randn_like(q), head_dim**-0.5
    oracle = KERNELS["reference"]
    want = oracle.forward(q.double(), k.double(), v.double(), band, scale)
    want_grads = oracle.backward(dout.double(), Saved(q.double(), k.double(), v.double(), *want), band, scale)
    out, lse = kernel.forward(q, k, v, band, scale)
    grads = kernel.backward(dout, Saved(q, k, v, out, lse), band, scale)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=2e-3)
    for got, expected in zip((out, *grads), (want[0], *want_grads), strict=True):
        assert got.shape == expected.shape
        assert (got.double() - expected).norm() < 1e-2 * expected.norm()
