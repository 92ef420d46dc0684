"""Every mode's schedule against dense attention in float64, on 1 to 16 virtual ranks, with any mask.

Fresh buffers are poisoned with NaN, so that nothing rests on memory that nobody wrote.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Score
from easyctx.mask import CAUSAL_MASK, Mask
from easyctx.mesh import divisors
from easyctx.modes import MODES
from easyctx.schedule import head_exchange, ring
from easyctx.virtual import VirtualRanks, virtual_attention
from tests.test_layout import masks, visible_pairs

SHARDED = [mode for mode in MODES.values() if mode.is_sequence_parallel]
NAMES = ("out", "lse", "dq", "dk", "dv")
CELLS = {
    "causal": lambda length: CAUSAL_MASK,
    "window": lambda length: Mask(window=length // 5 + 1),
    "packed": lambda length: Mask(documents=borders(length, 1)),
    "window+packed": lambda length: Mask(7, borders(length, 2)),
}


@pytest.fixture(autouse=True)
def _short_rings(monkeypatch):
    """A ring cuts its own work, and Ulysses its heads, also where they are as short as here."""
    monkeypatch.setattr(ring, "OWN_ROWS_MULTIPLE", 1)
    monkeypatch.setattr(head_exchange, "ROWS_OF_A_GROUP", 1)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty gives with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def borders(length: int, rows: int) -> Documents:
    """Documents of all sizes, from one token to several shards, other ones in each row."""
    cuts = [sorted({int(length * (f + 0.03 * row)) for f in (0.02, 0.04, 0.11, 0.3, 0.31, 0.8)}) for row in range(rows)]
    return Documents(length, tuple((0, *(c for c in row if 0 < c < length)) for row in cuts))


def random_tensors(length: int, heads: tuple[int, int], rows: int, dim: int = 4) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout."""
    shapes = [(rows, length, h, dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


def dense_attention(tensors: tuple[torch.Tensor, ...], mask: Mask, score: Score) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv by autograd through a plain softmax."""
    q, k, v, dout = (t.clone().requires_grad_() for t in tensors)
    wide_k, wide_v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * score.scale
    if score.softcap:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    visible = visible_pairs(mask, q.shape[1], q.shape[0])
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), wide_v)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return out.detach(), scores.logsumexp(-1).detach(), *grads


def check(mode, size, ring_degree, length, heads, mask, score, kernel="reference"):
    rows = len(mask.documents.starts) if mask.documents else 1
    tensors = random_tensors(length, heads, rows)
    want = dense_attention(tensors, mask, score)
    ranks = VirtualRanks(size, ring_degree if mode.over == "both" else None)
    got = virtual_attention(mode, ranks, tensors, mask, score, KERNELS[kernel])
    ranks.close()
    for name, g, w in zip(NAMES, got, want, strict=True):
        # A window of one token leaves dq and dk zero but for rounding, which is measured against the inputs.
        error = float((g - w).norm() / w.norm().clamp_min(tensors[0].norm() * 1e-2))
        assert error < 1e-12, f"{name} of {mode.name} on {size} ranks differs by {error:.1e}"


def heads_for(size: int) -> tuple[int, int]:
    """Query and key/value heads that any degree up to `size` can share out, with GQA."""
    return (size, size // 2) if size % 2 == 0 else (2 * size, size)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("mode", SHARDED, ids=lambda m: m.name)
def test_every_cell(mode, size, cell):
    ring_degree = divisors(size)[len(divisors(size)) // 2]
    length = 3 * mode.shard_layout(size, ring_degree if mode.over == "both" else None).multiple(size)
    check(mode, size, ring_degree, length, heads_for(size), CELLS[cell](length), Score(0.5))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_shape(data):
    mode = data.draw(st.sampled_from(SHARDED))
    size = data.draw(st.integers(1, 9))
    ring_degree = data.draw(st.sampled_from(divisors(size)))
    layout = mode.shard_layout(size, ring_degree if mode.over == "both" else None)
    length = data.draw(st.integers(1, 4)) * layout.multiple(size)
    mask = data.draw(masks(length))
    groups = data.draw(st.integers(1, 2))
    score = Score(0.5, data.draw(st.none() | st.just(1.0)))
    kernel = data.draw(st.sampled_from(["reference", "tiled"]))
    check(mode, size, ring_degree, length, (size * groups, size), mask, score, kernel)


@pytest.mark.parametrize("kernel", ["torch_cpu", "tiled"])
@pytest.mark.parametrize("mode", SHARDED, ids=lambda m: m.name)
def test_library_kernels_with_documents(mode, kernel):
    check(mode, 4, 2, 96, (4, 2), Mask(documents=borders(96, 2)), Score(0.5), kernel)


def sent(mode, size, mask, length=96):
    """Bytes that leave any rank in forward and backward together."""
    ranks = VirtualRanks(size, 2 if mode.over == "both" else None)
    virtual_attention(mode, ranks, random_tensors(length, (8, 8), 1), mask, Score(0.5), KERNELS["reference"])
    ranks.close()
    return ranks.bytes_sent()


@pytest.mark.parametrize("name", ["ring_attn", "zigzag_ring_attn", "dist_flash_attn"])
def test_what_a_mask_hides_is_not_sent(name):
    mode = MODES[name]
    everything = sent(mode, 8, CAUSAL_MASK)
    # Of each border between chunks three keys of twelve (zigzag: of six) are seen from across it.
    assert sent(mode, 8, Mask(4)) < everything / 7
    chunk = 6 if name == "zigzag_ring_attn" else 12
    apart = Documents(96, (tuple(range(0, 96, chunk)),))  # every document within one rank
    assert sent(mode, 8, Mask(documents=apart)) == sent(mode, 8, Mask(1)) == 0


def test_a_failing_rank_stops_the_others_at_once():
    ranks = VirtualRanks(3)

    def job(mesh):
        if mesh.sp_rank == 1:
            raise RuntimeError("out of luck")
        mesh.sp.transport.exchange(None, 0, torch.empty(1), 1)()

    with pytest.raises(RuntimeError, match="out of luck"):
        ranks.run(job)


@pytest.mark.parametrize(
    ("dtype", "dim", "start", "in_words"),
    [
        (torch.bfloat16, 8, 0, True),
        (torch.bfloat16, 8, 1, False),  # begins between words
        (torch.bfloat16, 4, 0, False),
        (torch.float32, 4, 0, True),
        (torch.float32, 1, 0, False),
        (torch.float64, 2, 0, True),
    ],
)
def test_heads_are_copied_bit_by_bit(dtype, dim, start, in_words):
    """Also what is no number, into a part of some memory and from a part of another."""
    size = 3 * 5 * 4 * dim
    bits = torch.randint(-128, 128, (2 * size * dtype.itemsize,), dtype=torch.int8)
    memory = bits.view(dtype)
    source = memory[start : start + size].view(3, 5, 4, dim)[:, :, 1:3]
    to = memory[size + start : 2 * size + start] if not start else torch.empty(size, dtype=dtype)
    place = to.view(5, 3, 4, dim).movedim(0, 1)[:, :, 2:]
    rest = to.view(5, 3, 4, dim)[:, :, :2].clone()
    assert head_exchange._has_words(source) == in_words
    head_exchange._copy(source, place)
    assert torch.equal(place.contiguous().view(torch.int8), source.contiguous().view(torch.int8))
    assert torch.equal(to.view(5, 3, 4, dim)[:, :, :2].contiguous().view(torch.int8), rest.view(torch.int8))
