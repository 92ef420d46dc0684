"""The FlexAttention kernel as far as a CPU can tell: its masks, the chain rule of its backward, its graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import easyctx.kernel
from easyctx.band import CAUSAL, FULL, Band, band_block
from easyctx.kernel import KERNELS, Saved, Score, Workload, flex, get_kernel
from easyctx.kernel.merge import Accumulator
from tests.test_kernels import plain_attention, tensors

BANDS = [FULL, CAUSAL, Band(-3, 0), Band(-4, 2), Band(low=-2)]
CPU = torch.device("cpu")


@pytest.fixture
def _on_a_cpu(monkeypatch):
    """PyTorch's own, uncompiled; it has a backward there too, but refuses to be asked for it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)


@pytest.fixture
def traced(_on_a_cpu, monkeypatch) -> CompileCounterWithBackend:
    """The same, traced as for a GPU, but not turned into code."""
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    graph = torch.compile(flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: graph)
    return counter


def visible(num_queries, num_keys, cuts, band):
    mask = band.allowed(num_queries, num_keys)
    if cuts:
        document = torch.repeat_interleave(torch.arange(len(cuts) - 1), torch.tensor(cuts).diff())
        mask = mask & (document[:, None] == document[None, :])
    return mask


@pytest.mark.parametrize("tile", [1, 4, 8])
@pytest.mark.parametrize("cuts", [(), (0, 1, 13, 30)])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_tiles_cover_what_is_seen(band, cuts, tile):
    block = band_block(30, 30 if cuts else 23, band)
    shape = (block.q.stop - block.q.start, block.k.stop - block.k.start)
    cuts = cuts if shape == (30, 30) else ()
    want = visible(*shape, cuts, block.band)
    first, last = flex.visible_stretch(*shape, cuts, block.band, CPU)
    assert torch.equal(first, want.int().argmax(1))
    assert torch.equal(last - first + 1, want.sum(1))
    partial, full = flex._tiles(first, last, shape[1], tile)
    for top in range(partial.shape[0]):
        for left in range(partial.shape[1]):
            part = want[top * tile : (top + 1) * tile, left * tile : (left + 1) * tile]
            assert bool(full[top, left]) == bool(part.all())
            assert bool(partial[top, left]) == bool(part.any() and not part.all())
    counts, indices = flex._listed(partial)
    for top, count in enumerate(counts[0, 0].tolist()):
        assert indices[0, 0, top, :count].tolist() == partial[top].nonzero().flatten().tolist()


@pytest.mark.usefixtures("_on_a_cpu")
@pytest.mark.parametrize("cuts", [(), (0, 1, 100, 300)])
@pytest.mark.parametrize(("band", "softcap"), [(FULL, None), (CAUSAL, 2.0), (Band(-130, 0), None)], ids=str)
def test_forward(band, softcap, cuts):
    """On several tiles: the mask's form, GQA, and the lse's logarithm."""
    q, k, v = (t.float() for t in tensors(300, 300))
    score = Score(0.3, softcap)
    out, lse = flex._forward(q, k, v, cuts, band, score)
    reference = KERNELS["reference"]
    if cuts:
        want, want_lse = reference.forward_packed(q, k, v, cuts, band, score)
    else:
        want, want_lse = reference.forward(q, k, v, band, score)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


@torch.library.custom_op("easyctx_tests::halves", mutates_args=())
def halves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    """out and gradients over two blocks of keys, where kernels run in practice: inside an operator."""
    kernel, score, parts = flex.Flex(), Score(0.3, 1.5), (slice(0, 4), slice(4, 10))
    total = Accumulator(q)
    for keys in parts:
        total.add(*kernel.forward(q, k[:, keys], v[:, keys], FULL, score))
    out, lse = total.result()
    blocks = [kernel.backward(dout, Saved(q, k[:, s], v[:, s], out, lse), FULL, score) for s in parts]
    dq = blocks[0][0] + blocks[1][0]
    return [out.clone(), dq, torch.cat([b[1] for b in blocks], 1), torch.cat([b[2] for b in blocks], 1)]


@pytest.mark.usefixtures("_on_a_cpu")
def test_backward_takes_the_merged_output():
    q, k, v = (t.float().requires_grad_() for t in tensors(6, 10))
    want, _ = plain_attention(q, k, v, FULL, Score(0.3, 1.5))
    dout = torch.randn_like(want)
    wanted = (want.detach(), *torch.autograd.grad(want, (q, k, v), dout))
    for got, expected in zip(halves(q, k, v, dout), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_masks_share_a_graph(traced):
    """Bands, documents and lengths are data: a graph for what is masked, one more for other lengths.

    Scales and softcaps are not: each has a graph.
    """
    kernel, reference = flex.Flex(), KERNELS["reference"]

    def check(length, cuts, band, score):
        q, k, v = (t.float() for t in tensors(length, length))
        dout = torch.randn_like(q)
        saved = Saved(q, k, v, *reference.forward_packed(q, k, v, cuts, band, score))
        got = kernel.backward_packed(dout, saved, cuts, band, score)
        want = reference.backward_packed(dout, saved, cuts, band, score)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    for length, cuts in ((12, (0, 1, 5, 12)), (12, (0, 12)), (17, (0, 9, 17)), (23, (0, 23))):
        for band in (CAUSAL, Band(-2, 0)):
            check(length, cuts, band, Score(0.3))
    assert traced.frame_count == 2
    for score in (Score(0.3, 1.5), Score(0.3, 2.5)):
        check(29, (0, 7, 29), CAUSAL, score)
    assert traced.frame_count == 4


def test_it_is_taken_where_faster_kernels_cannot(monkeypatch):
    monkeypatch.setattr(flex, "_has_triton", lambda: True)
    monkeypatch.setattr(easyctx.kernel, "_choose", easyctx.kernel._choose.__wrapped__)  # keeps no choice
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    gpu = torch.device("cuda")
    assert get_kernel("flex", Workload(gpu, torch.bfloat16, 256, softcapped=True)).name == "flex"
    assert get_kernel("auto", Workload(gpu, torch.bfloat16, 256, softcapped=True)).name == "flex"
    assert get_kernel("auto", Workload(gpu, torch.bfloat16, 256, windowed=True)).name == "torch_flash"
    with pytest.raises(ValueError, match="'flex' takes bfloat16 or float16, not torch.float32"):
        get_kernel("flex", Workload(gpu, torch.float32, 64))
    with pytest.raises(ValueError, match="'flex' runs on CUDA only"):
        get_kernel("flex", Workload(CPU, torch.bfloat16, 64))
