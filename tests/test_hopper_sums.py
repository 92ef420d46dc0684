"""Sums that live in flash-attn-4's Hopper kernels: what surrounds those, with stand-ins for the kernels themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyctx.band import FULL, Block
from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Score
from easyctx.mask import CAUSAL_MASK, Mask
from easyctx.modes import MODES
from easyctx.schedule import ring
from easyctx.virtual import VirtualRanks, virtual_attention
from tests import hopper_stand_in

SHARDED = [mode for mode in MODES.values() if mode.is_sequence_parallel]
MASKS = {
    "causal": lambda length: CAUSAL_MASK,
    "window": lambda length: Mask(window=length // 5 + 1),
    "packed": lambda length: Mask(documents=Documents(length, ((0, 1, length // 4, length // 4 + 9, length // 2),))),
    "window+packed": lambda length: Mask(7, Documents(length, ((0, 3, length // 2), (0, length // 3)))),
}


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(ring, "OWN_ROWS_MULTIPLE", 2)
    return hopper_stand_in.install(monkeypatch)


def check(kernel, mode, size, local, mask_of, rows=2, softcap=None):
    length = size * local
    mask = mask_of(length)
    rows = max(rows, len(mask.documents.starts)) if mask.documents else rows
    generator = torch.Generator().manual_seed(length + size)
    heads = (16, 16, 16, 16) if size == 16 else (8, 4, 4, 8)
    tensors = tuple(torch.randn(rows, length, h, 8, generator=generator) for h in heads)
    score = Score(0.4, softcap)
    ranks = VirtualRanks(size, 2 if mode.over == "both" else None)
    got = virtual_attention(mode, ranks, tensors, mask, score, kernel)
    ranks.close()
    alone = VirtualRanks(1)
    exact = tuple(t.double() for t in tensors)
    want = virtual_attention(MODES["ring_attn"], alone, exact, mask, score, KERNELS["tiled"])
    alone.close()
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        # `out` is kept in bfloat16 and a rest here, so that only a result that lost the rest is off by its rounding.
        limit = 4e-3 if name == "out" else 1e-5 if name == "lse" else 5e-3
        size_of = w.norm().clamp_min(float(want[4].norm()))  # where a query sees one key, dq and dk are zero
        assert (g.double() - w).norm() < limit * size_of, f"{name}: {float((g.double() - w).norm() / size_of):.1e}"


@pytest.mark.parametrize(("local", "softcap"), [(40, None), (36, 1.5), (26, None)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", SHARDED, ids=lambda mode: mode.name)
def test_modes(kernel, mode, local, mask, softcap):
    """Shards that are whole tiles, shards that are not, and halves that are not."""
    check(kernel, mode, 4, local, MASKS[mask], softcap=softcap)


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(SHARDED),
    size=st.sampled_from([1, 2, 4, 8]),
    local=st.integers(2, 30).map(lambda half: 2 * half),
    window=st.none() | st.integers(1, 60),
)
def test_any_length_and_window(mode, size, local, window):
    with pytest.MonkeyPatch.context() as monkeypatch:
        kernel = hopper_stand_in.install(monkeypatch)
        monkeypatch.setattr(ring, "OWN_ROWS_MULTIPLE", 2)
        if mode.over == "both" and size == 1:
            return
        check(kernel, mode, size, local, lambda length: Mask(window), rows=1)


def test_an_unrounded_output_has_the_rest(kernel):
    """What a sink scales is not rounded before it is."""
    q, k, v = (torch.randn(2, 24, heads, 8, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2))
    outputs = {}
    for unrounded in (False, True):
        running = kernel.output(q, Score(0.4), unrounded=unrounded)
        for keys in (slice(0, 8), slice(8, 24)):
            running.add(k, v, Block(slice(0, 24), keys, FULL), is_last=keys.stop == 24)
        outputs[unrounded], _ = running.result()
    want, _ = KERNELS["reference"].forward(*(t.double() for t in (q, k, v)), FULL, Score(0.4))
    error = {unrounded: float((out.double() - want).norm() / want.norm()) for unrounded, out in outputs.items()}
    assert error[True] < 1e-5 < 1e-3 < error[False]


def test_queries_without_keys_have_nothing(kernel):
    q, k, v = torch.ones(1, 6, 2, 8), torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8)
    running = kernel.output(q, Score(1.0))
    running.add(k, v, Block(slice(2, 5), slice(0, 4), FULL))
    out, lse = running.result()
    assert (out.abs().sum((0, 2, 3)) > 0).tolist() == [False, False, True, True, True, False]
    assert lse.isneginf().any(1)[0].tolist() == [True, True, False, False, False, True]
