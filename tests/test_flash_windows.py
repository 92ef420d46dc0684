"""FlashAttention-2's way of counting windows, and the blocks that it is given so that they mean what a band means."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyctx.band import Band, band_block
from easyctx.kernel import torch_cuda
from easyctx.kernel.torch_cuda import blocks_of_rows

SIDE = st.none() | st.integers(-45, 45)


def flash_mask(num_queries: int, num_keys: int, causal: bool, window: dict[str, int]) -> torch.Tensor:
    """What the library lets through, as its host code reads its arguments (flash_api.cpp, `set_params_fprop`)."""
    left, right = window.get("window_size_left", -1), window.get("window_size_right", -1)
    left, right = (-1 if side >= num_keys else side for side in (left, right))
    right = 0 if causal else right
    if left < 0 and right < 0:
        return torch.ones(num_queries, num_keys, dtype=torch.bool)
    left, right = (num_keys if side < 0 else side for side in (left, right))
    diagonal = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
    return (diagonal >= -left) & (diagonal <= right)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), SIDE, SIDE)
def test_every_band_is_what_the_library_makes_of_it(num_queries, num_keys, low, high):
    block = band_block(num_queries, num_keys, Band(low, high))
    if block is None:
        return
    num_queries, num_keys = block.q.stop - block.q.start, block.k.stop - block.k.start
    found = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    parts = blocks_of_rows(num_queries, num_keys, block.band)
    for part in parts:
        (_, _, *lengths), mask = torch_cuda._flash_arguments(part)
        found[part.q, part.k] = flash_mask(*lengths, *mask)
    assert torch.equal(found, block.band.allowed(num_queries, num_keys))
    assert len(parts) <= 3


def test_an_open_side_would_mask_the_first_of_many_queries():
    """Why there are parts at all: 99 queries of which the first 52 see all of 48 keys."""
    band = Band(low=-51)
    whole = flash_mask(99, 48, *torch_cuda._flash_mask(band, 99, 48))
    assert not whole[0].any()
    assert band.allowed(99, 48)[0].all()


def test_gradients_of_parts_are_put_together(monkeypatch):
    """Values and gradients by parts against the whole band, with the ops replaced by their definition."""
    band, (num_queries, num_keys) = Band(-51, 30), (99, 48)
    assert len(blocks_of_rows(num_queries, num_keys, band)) == 3
    q, dout = torch.randn(2, 1, num_queries, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, num_keys, 2, 8, dtype=torch.float64)
    score = torch_cuda.Score(0.3)
    reference = torch_cuda_stand_in(monkeypatch)
    out, lse = reference.forward(q, k, v, band, score)
    want = (out, lse, *reference.backward(dout, torch_cuda.Saved(q, k, v, out, lse), band, score))
    kernel = torch_cuda.TorchFlash()
    out, lse = kernel.forward(q, k, v, band, score)
    got = (out, lse, *kernel.backward(dout, torch_cuda.Saved(q, k, v, out, lse), band, score))
    for g, w, exact in zip(got, want, (True, True, True, False, False), strict=True):
        # Sums over parts are float32.
        torch.testing.assert_close(g.double(), w, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-5)


def torch_cuda_stand_in(monkeypatch):
    """Has the library's two calls computed by the float64 reference, with the library's reading of the mask."""
    from easyctx.kernel import KERNELS

    reference = KERNELS["reference"]

    def as_band(lengths, mask):
        found = flash_mask(*lengths[2:], *mask)
        rows, columns = torch.nonzero(found, as_tuple=True)
        band = Band(int((columns - rows).min()), int((columns - rows).max()))
        assert torch.equal(band.allowed(*lengths[2:]), found)
        return band

    def forward(q, k, v, lengths, mask, score):
        return reference.forward(q, k, v, as_band(lengths, mask), score)

    def backward(dout, saved, lengths, mask, score):
        return reference.backward(dout, saved, as_band(lengths, mask), score)

    monkeypatch.setattr(torch_cuda, "flash_forward", forward)
    monkeypatch.setattr(torch_cuda, "flash_backward", backward)
    return reference
