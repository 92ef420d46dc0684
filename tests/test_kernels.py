"""Every kernel that runs here against autograd through a plain softmax, and the merge of partials."""

import threading

import pytest
import torch

from easyctx.band import CAUSAL, FULL, Band, band_block
from easyctx.kernel import KERNELS, Saved, Score, Workload, flash4, get_kernel, tiled
from easyctx.kernel.base import VarlenKernel
from easyctx.kernel.merge import Accumulator

CPU_KERNELS = [k for k in KERNELS.values() if k.refuses(Workload(torch.device("cpu"), torch.float64, 8)) is None]
SCORE = Score(0.3)
SHAPES = {"square": (12, 12), "wide": (7, 12), "tall": (12, 7)}


def plain_attention(q, k, v, band, score):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * score.scale
    if score.softcap:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    scores = scores.masked_fill(~band.allowed(q.shape[1], k.shape[1]), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def tensors(num_queries, num_keys, heads=(4, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, num_queries, heads[0], 8), (2, num_keys, heads[1], 8), (2, num_keys, heads[1], 8)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles even in small blocks."""
    monkeypatch.setattr(tiled, "LARGEST_TILE", 5)
    monkeypatch.setattr(tiled, "SMALLEST_TILE", 1)


@pytest.mark.parametrize("name", ["cudnn", "torch_flash"])
def test_gpus_that_are_too_old_are_refused(name, monkeypatch):
    """A T4's: both ops raise there, and `auto` is to go on to the next kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert KERNELS[name].refuses(Workload(torch.device("cuda"), torch.float16, 64)).startswith("needs compute capab")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(-3, 0), Band(-4, 2), Band(low=-2)], ids=str)
@pytest.mark.parametrize("score", [SCORE, Score(0.5, softcap=1.5)], ids=["plain", "softcap"])
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
def test_forward_and_backward(kernel, score, band, shape):
    windowed = not (band.is_full or band.is_causal)
    work = Workload(torch.device("cpu"), torch.float64, 8, windowed, score.softcap is not None)
    if reason := kernel.refuses(work):
        pytest.skip(f"{kernel.name} {reason}")
    num_queries, num_keys = SHAPES[shape]
    block = band_block(num_queries, num_keys, band)  # plans hold no query without a key
    num_queries, num_keys, band = block.q.stop - block.q.start, block.k.stop - block.k.start, block.band
    q, k, v = (t.requires_grad_() for t in tensors(num_queries, num_keys))
    want, want_lse = plain_attention(q, k, v, band, score)
    dout = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, (q, k, v), dout)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, band, score)
        grads = kernel.backward(dout, Saved(q, k, v, out, lse), band, score)
    for got, expected in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
def test_backward_of_a_block_takes_the_merged_lse(kernel):
    """Two blocks with the global out and lse give the gradients of the whole."""
    q, k, v = (t.requires_grad_() for t in tensors(6, 10))
    want, _ = plain_attention(q, k, v, FULL, SCORE)
    dout = torch.randn_like(want)
    want_dq, want_dk, want_dv = torch.autograd.grad(want, (q, k, v), dout)
    halves = [slice(0, 4), slice(4, 10)]
    with torch.no_grad():
        total = Accumulator(q)
        for keys in halves:
            total.add(*kernel.forward(q, k[:, keys], v[:, keys], FULL, SCORE))
        out, lse = total.result()
        parts = [kernel.backward(dout, Saved(q, k[:, s], v[:, s], out, lse), FULL, SCORE) for s in halves]
    torch.testing.assert_close(out, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(p[0] for p in parts), want_dq, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), want_dk, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 1), want_dv, rtol=1e-12, atol=1e-12)


def merged_error(parts: int) -> float:
    """Error of `parts` half-precision partials merged, relative to that of one call over the same keys."""
    q, k, v = tensors(32, 64 * 16, dtype=torch.bfloat16)
    want, _ = plain_attention(q.double(), k.double(), v.double(), FULL, SCORE)
    kernel, size = KERNELS["torch_cpu"], k.shape[1] // parts
    whole, _ = kernel.forward(q, k, v, FULL, SCORE)
    total = Accumulator(q)
    for start in range(0, k.shape[1], size):
        keys = slice(start, start + size)
        total.add(*kernel.forward(q, k[:, keys], v[:, keys], FULL, SCORE))
    return float((total.result()[0].double() - want).norm() / (whole.double() - want).norm())


def test_merge_error_does_not_grow_with_the_ring():
    errors = {parts: merged_error(parts) for parts in (2, 4, 8, 16)}
    assert max(errors.values()) < 1.3, errors
    assert errors[16] < 1.05 * errors[2], errors


def test_merge_of_very_different_magnitudes_is_finite():
    total = Accumulator(torch.zeros(1, 1, 1, 2))
    total.add(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), -1e4))
    total.add(torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), 1e4))
    out, lse = total.result()
    assert out.eq(3).all()
    assert lse.item() == 1e4


def test_auto_says_once_what_it_took(caplog):
    work = Workload(torch.device("cpu"), torch.float16, 24)
    assert get_kernel("auto", work).name == "torch_cpu"
    assert get_kernel("auto", work).name == "torch_cpu"
    assert [r for r in caplog.messages if "torch_cpu" in r and "float16" in r] == caplog.messages[:1]


def test_refusals_name_the_reason():
    cpu = Workload(torch.device("cpu"), torch.float32, 64)
    with pytest.raises(ValueError, match="unknown attention kernel 'nope'.*torch_cpu"):
        get_kernel("nope", cpu)
    with pytest.raises(ValueError, match="'cudnn' runs on CUDA only, not on cpu"):
        get_kernel("cudnn", cpu)
    with pytest.raises(ValueError, match=r"'torch_flash' takes bfloat16 or float16, not torch.float32"):
        get_kernel("torch_flash", Workload(torch.device("cuda"), torch.float32, 64))


def test_auto_falls_back_on_tiles():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert get_kernel("auto", Workload(gpu, torch.float32, 64)).name == "tiled"
    assert get_kernel("auto", Workload(cpu, torch.float32, 64, windowed=True)).name == "tiled"
    assert get_kernel("auto", Workload(cpu, torch.float32, 64, softcapped=True)).name == "tiled"


class ByCuSeqlens(VarlenKernel):
    """A library with cu_seqlens, made of the reference: counts its calls."""

    name, calls = "by_cu_seqlens", 0

    def forward(self, *arguments):
        return KERNELS["reference"].forward(*arguments)

    def backward(self, *arguments):
        return KERNELS["reference"].backward(*arguments)

    def forward_flat(self, q, k, v, cuts, band, score):
        self.calls += 1
        assert q.dim() == k.dim() == 3
        out, lse = KERNELS["reference"].forward_packed(q[None], k[None], v[None], cuts, band, score)
        return out[0], lse[0]

    def backward_flat(self, dout, saved, cuts, band, score):
        self.calls += 1
        whole = Saved(*(t[None] for t in saved))
        dq, dk, dv = KERNELS["reference"].backward_packed(dout[None], whole, cuts, band, score)
        return dq[0], dk[0], dv[0]


@pytest.mark.parametrize("rows", [1, 2])
def test_documents_in_one_call(rows):
    """One row is one call; several rows, which may not share a cu_seqlens, go square by square."""
    kernel, cuts = ByCuSeqlens(), (0, 1, 5, 12)
    q, k, v = (t[:rows] for t in tensors(12, 12))
    out, lse = kernel.forward_packed(q, k, v, cuts, CAUSAL, SCORE)
    grads = kernel.backward_packed(torch.ones_like(q), Saved(q, k, v, out, lse), cuts, CAUSAL, SCORE)
    assert kernel.calls == (2 if rows == 1 else 0)
    reference = KERNELS["reference"]
    want, want_lse = reference.forward_packed(q, k, v, cuts, CAUSAL, SCORE)
    want_grads = reference.backward_packed(torch.ones_like(q), Saved(q, k, v, want, want_lse), cuts, CAUSAL, SCORE)
    for got, expected in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        assert torch.equal(got, expected)


class FakeLibrary:
    """What of flash-attn-4's interface takes part in the rounding: sums, scaled and rounded at the end."""

    def __init__(self):
        def convert(sums, out, scale):
            out.copy_(sums * scale)

        convert.compile_cache = {}
        self._bwd_postprocess_convert = convert

    def backward(self, sums):
        out = torch.empty(sums.shape, dtype=torch.bfloat16)
        self._bwd_postprocess_convert(sums.clone(), out, 0.25)
        return out


def test_unrounded_gradients_in_several_threads(monkeypatch):
    """Each thread gets its own sums, to 16 bits rather than 8; outside the block the library is as it was."""
    library = FakeLibrary()
    monkeypatch.setattr(flash4, "_interface", lambda: library)
    errors = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            sums = torch.randn(50, generator=generator)
            with flash4._UnroundedGradients() as unrounded:
                rounded = library.backward(sums)
                errors.append(float((unrounded.of(rounded) - sums / 4).abs().max()))
            assert unrounded.of(rounded).dtype == torch.float32

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8 * 200
    assert max(errors) < 2e-5
    sums = torch.randn(50)
    assert torch.equal(library.backward(sums), (sums / 4).bfloat16())
    assert library._bwd_postprocess_convert.compile_cache == {}
