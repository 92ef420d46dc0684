"""Kernels on a GPU against float64: `EASYCTX_TEST_GPUS=0 bash tests/run.sh -m gpu`."""

import pytest
import torch

from easyctx.band import CAUSAL, FULL, Band, band_block
from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Saved, Score, Workload
from easyctx.kernel.merge import Accumulator
from easyctx.mask import CAUSAL_MASK, Mask
from easyctx.modes import MODES
from easyctx.virtual import VirtualRanks, virtual_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; EASYCTX_TEST_GPUS names those to use"),
]

BANDS = [
    (256, 256, CAUSAL),
    (256, 384, FULL),
    (384, 128, FULL),
    (256, 256, Band(-99, 0)),
    (256, 256, Band(low=57)),
    (99, 48, Band(low=-51)),
    (209, 10, Band(-199, 0)),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
KERNEL = pytest.mark.parametrize("name", ["flash4", "cudnn", "torch_flash", "flex", "tiled"])


def random_tensors(num_queries, num_keys, heads, head_dim, dtype, rows=2):
    """q, k, v, dout."""
    counts = ((num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]), (num_queries, heads[0]))
    return [torch.randn((rows, n, h, head_dim), device="cuda", dtype=dtype) for n, h in counts]


def kernel_or_skip(name, dtype, head_dim, band, score, packed=False):
    windowed = not (band.is_full or band.is_causal)
    work = Workload(torch.device("cuda"), dtype, head_dim, windowed, score.softcap is not None, packed)
    if reason := KERNELS[name].refuses(work):
        pytest.skip(f"{name} {reason}")
    return KERNELS[name]


def check(got, want, dtype):
    """(out, lse, dq, dk, dv) against float64."""
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=2e-3)
    for g, w in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        assert g.shape == w.shape
        assert (g.double() - w).norm() < TOLERANCE[dtype] * w.norm()


def forward_and_backward(kernel, q, k, v, dout, band, score, cuts=()):
    if cuts:
        out, lse = kernel.forward_packed(q, k, v, cuts, band, score)
        return out, lse, *kernel.backward_packed(dout, Saved(q, k, v, out.to(q.dtype), lse), cuts, band, score)
    out, lse = kernel.forward(q, k, v, band, score)
    return out, lse, *kernel.backward(dout, Saved(q, k, v, out.to(q.dtype), lse), band, score)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_queries", "num_keys", "band"), BANDS, ids=str)
@KERNEL
def test_against_float64(name, num_queries, num_keys, band, dtype, head_dim, heads):
    score = Score(head_dim**-0.5)
    kernel = kernel_or_skip(name, dtype, head_dim, band, score)
    block = band_block(num_queries, num_keys, band)
    num_queries, num_keys, band = block.q.stop - block.q.start, block.k.stop - block.k.start, block.band
    tensors = random_tensors(num_queries, num_keys, heads, head_dim, dtype)
    want = forward_and_backward(KERNELS["reference"], *(t.double() for t in tensors), band, score)
    check(forward_and_backward(kernel, *tensors, band, score), want, dtype)


@pytest.mark.parametrize("band", [CAUSAL, Band(-40, 0)], ids=["causal", "window"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 2])
@KERNEL
def test_documents_and_softcap(name, rows, softcap, band):
    score, cuts = Score(64**-0.5, softcap), (0, 1, 100, 256, 300, 513)
    kernel = kernel_or_skip(name, torch.bfloat16, 64, band, score, packed=True)
    tensors = random_tensors(513, 513, (8, 2), 64, torch.bfloat16, rows)
    want = forward_and_backward(KERNELS["reference"], *(t.double() for t in tensors), band, score, cuts)
    check(forward_and_backward(kernel, *tensors, band, score, cuts), want, torch.bfloat16)


@torch.library.custom_op("easyctx_tests::two_blocks", mutates_args=())
def two_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, name: str) -> list[torch.Tensor]:
    """out, lse and gradients over two blocks of keys, inside an operator, where kernels run in practice."""
    kernel, score = KERNELS[name], Score(128**-0.5)
    halves = (slice(0, k.shape[1] // 2), slice(k.shape[1] // 2, k.shape[1]))
    total = Accumulator(q)
    for keys in halves:
        total.add(*kernel.forward(q, k[:, keys], v[:, keys], FULL, score))
    out, lse = total.result()
    out = out.to(q.dtype)
    parts = [kernel.backward(dout, Saved(q, k[:, s], v[:, s], out, lse), FULL, score) for s in halves]
    dq = parts[0][0].float() + parts[1][0].float()
    return [out.clone(), lse.clone(), dq, *(torch.cat([part[i] for part in parts], 1) for i in (1, 2))]


@KERNEL
def test_backward_takes_the_merged_output(name):
    kernel_or_skip(name, torch.bfloat16, 128, FULL, Score(128**-0.5))
    tensors = random_tensors(300, 800, (8, 2), 128, torch.bfloat16)
    want = forward_and_backward(KERNELS["reference"], *(t.double() for t in tensors), FULL, Score(128**-0.5))
    check(two_blocks(*tensors, name), want, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [96, 256])
@pytest.mark.parametrize("name", ["flex", "torch_flash", "tiled"])
def test_other_head_dims(name, head_dim):
    score = Score(head_dim**-0.5, None if name == "torch_flash" else 30.0)
    kernel = kernel_or_skip(name, torch.bfloat16, head_dim, CAUSAL, score)
    tensors = random_tensors(700, 700, (8, 4), head_dim, torch.bfloat16)
    want = forward_and_backward(KERNELS["reference"], *(t.double() for t in tensors), CAUSAL, score)
    check(forward_and_backward(kernel, *tensors, CAUSAL, score), want, torch.bfloat16)


MASKS = {
    "causal": lambda length: CAUSAL_MASK,
    "window": lambda length: Mask(length // 3),
    "packed": lambda length: Mask(None, Documents(length, ((0, 1, 130, length // 2, length // 2 + 77),))),
    "window+packed": lambda length: Mask(100, Documents(length, ((0, 1, 130, length // 2, length // 2 + 77),))),
}


@pytest.mark.parametrize("name", ["flash4", "cudnn", "torch_flash"])
@pytest.mark.parametrize(("heads", "head_dim", "rows"), [((8, 2), 128, 1), ((8, 8), 64, 2)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [2048, 1000])
@pytest.mark.parametrize("mode", [mode for mode in MODES.values() if mode.is_sequence_parallel], ids=lambda m: m.name)
def test_modes_on_virtual_ranks(mode, length, mask, heads, head_dim, rows, name):
    """Shards that are whole tiles and shards that are not: as near to float64 as one device is."""
    mask, score = MASKS[mask](length), Score(head_dim**-0.5)
    work = Workload(
        torch.device("cuda"), torch.bfloat16, head_dim, mask.window is not None, False, bool(mask.documents)
    )
    if reason := KERNELS[name].refuses(work):
        pytest.skip(f"{name} {reason}")
    torch.manual_seed(0)
    tensors = tuple(random_tensors(length, length, heads, head_dim, torch.bfloat16, rows))
    exact = tuple(t.double() for t in tensors)
    found = [
        attention_of(which, size, KERNELS[kernel], inputs, mask, score)
        for which, size, kernel, inputs in (
            (mode, 4, name, tensors),
            (MODES["ring_attn"], 1, name, tensors),
            (MODES["ring_attn"], 1, "tiled", exact),
        )
    ]
    # flash4 sums inside its kernels; rounding every block's part takes the others a quarter further.
    limit = 1.05 if name == "flash4" else 1.3
    for i, (got, alone, want) in enumerate(zip(*found, strict=True)):
        if i == 1:
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)
        else:
            error, own_error = ((t.bfloat16().double() - want).norm() / want.norm() for t in (got, alone))
            assert error < limit * own_error, (i, error / own_error, own_error)


def attention_of(mode, size, kernel, tensors, mask, score):
    """out, lse, dq, dk, dv over `size` virtual ranks."""
    ranks = VirtualRanks(size, 2 if mode.over == "both" and size > 1 else None)
    found = virtual_attention(mode, ranks, tensors, mask, score, kernel)
    ranks.close()
    return found
