"""The Triton kernels against plain PyTorch: interpreted on a CPU, compiled where EASYCTX_TEST_GPUS names a GPU.

The interpreter (TRITON_INTERPRET, set in conftest.py) runs the programs of a kernel one after the other in NumPy. It
checks addresses, masks and arithmetic in every dtype; it has no warps, so that barriers are for a GPU to check.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyctx import tiled_loss
from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Score, merge
from easyctx.mask import CAUSAL_MASK, Mask
from easyctx.modes import MODES
from easyctx.virtual import VirtualRanks, virtual_attention
from tests import hopper_stand_in
from tests.test_hopper_sums import check

pytest.importorskip("triton", reason="Triton's kernels need it: pip install triton (beside a CPU torch, too)")

from easyctx.kernel.hopper.order import collect, order_of_tile
from easyctx.kernel.merge_cuda import merge_fused
from easyctx.tiled_loss_cuda import loss_and_gradient_

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of what is masked later
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a value: one rounding, and of bfloat16 twice that, since the interpreter cuts what a GPU rounds.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2**-20}
INFINITY = float("inf")

dtypes = st.sampled_from(DTYPES)
drawn = settings(max_examples=30, deadline=None)
INTERPRETER = threading.Lock()  # it is for one thread at a time, and virtual ranks are threads


def inside(shape: tuple[int, ...], dtype: torch.dtype, room: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory full of NaN, and a view of this shape in the middle of it, filled at random, whose last axis is whole."""
    around = torch.full([n + 2 * room for n in shape], float("nan"), dtype=dtype, device=DEVICE)
    view = around[tuple(slice(room, room + n) for n in shape)]
    return around, view.copy_(torch.randn(shape, device=DEVICE))


def is_untouched(around: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether nothing beside the view was written."""
    view.fill_(float("nan"))
    return bool(around.isnan().all())


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, slack: float = 1e-6) -> None:
    """To one rounding in `dtype`; `slack` is what float32 sums may be off."""
    torch.testing.assert_close(got.double(), want.double(), rtol=ROUNDING[dtype], atol=slack)


def assert_nearly(got: Any, want: Any, limit: float) -> None:
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert (g.double() - w).norm() < limit * w.norm(), name


def counted(kernel: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The kernel, from any thread; every call is noted."""

    def run(*args: Any) -> Any:
        calls.append(args)
        with INTERPRETER:
            return kernel(*args)

    return run


@drawn
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 8, 20, 64, 96])),
    dtype=dtypes,
    seen=st.tuples(st.sampled_from([0.0, 0.6, 1.0]), st.sampled_from([0.0, 0.6, 1.0])),
    transposed=st.booleans(),
)
def test_merge(shape: tuple[int, ...], dtype: torch.dtype, seen: tuple[float, float], transposed: bool) -> None:
    """Into views; with queries that saw no key before, in what comes, or in both."""
    torch.manual_seed(sum(shape))
    batch, length, heads, _ = shape
    around, out = inside(shape, torch.float32)
    around_lse, lse = inside((batch, heads, length), torch.float32)
    more, more_lse = torch.randn(shape, device=DEVICE).to(dtype), 20 * torch.randn(batch, heads, length, device=DEVICE)
    for part, values, share in ((out, lse, seen[0]), (more, more_lse, seen[1])):
        unseen = torch.rand_like(values) >= share
        values.masked_fill_(unseen, -INFINITY)
        part.masked_fill_(unseen.transpose(1, 2)[..., None], 0)
    if transposed:
        more = more.mT.contiguous().mT
    want, want_lse = out.double(), lse.double()
    merge.merge(want, want_lse, more, more_lse.double())
    merge_fused(out, lse, more, more_lse)
    assert_close(out, want, torch.float32)
    assert_close(lse, want_lse, torch.float32)
    assert is_untouched(around, out)
    assert is_untouched(around_lse, lse)


@pytest.mark.parametrize("mask", ["causal", "window and documents"])
@pytest.mark.parametrize("mode", ["ring_attn", "zigzag_ring_attn", "striped_attn", "dist_flash_attn"])
def test_a_ring_that_merges_by_it(mode: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices that schedules and packed rows give it."""
    documents = Documents(72, ((0, 7, 40), (0, 22, 23)))
    tensors = tuple(torch.randn(2, 72, heads, 8, device=DEVICE) for heads in (4, 2, 2, 4))
    told = CAUSAL_MASK if mask == "causal" else Mask(9, documents)

    def attend(size: int, tensors: Any, kernel: Any) -> Any:
        ranks = VirtualRanks(size)
        result = virtual_attention(MODES[mode if size > 1 else "ring_attn"], ranks, tensors, told, Score(0.4), kernel)
        ranks.close()
        return result

    want = attend(1, tuple(t.double() for t in tensors), KERNELS["reference"])
    calls: list[Any] = []
    monkeypatch.setattr(merge, "merge", counted(merge_fused, calls))
    got = attend(4, tensors, KERNELS["tiled"])
    assert calls
    assert_nearly(got, want, 1e-5)


@drawn
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 3), st.sampled_from([8, 64])),
    dtype=dtypes,
    tiles=st.tuples(st.integers(1, 40), st.none() | st.integers(1, 40)),
    rows=st.sampled_from(["none", "apart", "out"]),
    permuted=st.booleans(),
)
def test_collect(
    shape: tuple[int, ...], dtype: torch.dtype, tiles: tuple[int, int | None], rows: str, permuted: bool
) -> None:
    """One or two sums in orders of their own, whose last tiles end in rows that are none; in place, and permuted."""
    torch.manual_seed(sum(shape))
    batch, length, heads, head_dim = shape
    like = torch.empty(shape)
    sums = []
    for tile in tiles if not permuted else tiles[:1]:
        if tile is not None:
            values = hopper_stand_in.new_sums(length, tile, like).zero_()
            real = torch.randn(batch, heads, values.shape[2] // head_dim, head_dim)
            real[:, :, length:] = float("nan")
            hopper_stand_in.add_to_sums(values, real, tile)
            sums.append((values.to(DEVICE), hopper_stand_in.order(tile, head_dim).int().to(DEVICE), tile))
    around, out = inside(shape, dtype)
    extra = {"none": None, "apart": torch.randn(shape, device=DEVICE), "out": out}[rows]
    positions = torch.randperm(length, device=DEVICE) if permuted else None
    want = hopper_stand_in.collect(sums, 0.3, None, shape, torch.float64)
    want = (want if positions is None else want[:, positions]) + (0 if extra is None else extra.double())
    got = collect(sums, 0.3, extra, shape, dtype, out=out, positions=positions)
    assert got is out
    assert_close(out, want, dtype)
    assert is_untouched(around, out)


@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "usp_attn"])
def test_a_ring_whose_sums_it_collects(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In new memory, with the strides that the schedules' gradients have."""
    calls: list[Any] = []
    monkeypatch.setattr(hopper_stand_in, "collect", counted(collect, calls))
    kernel = hopper_stand_in.install(monkeypatch)
    check(kernel, MODES[mode], 4, 20, lambda length: Mask(window=length // 5 + 1))
    assert calls


@pytest.mark.parametrize(("tile", "head_dim"), [(1, 8), (5, 8), (64, 128), (128, 128)])
def test_the_order_of_a_tile_is_learned(tile: int, head_dim: int) -> None:
    order = hopper_stand_in.order(tile, head_dim).to(DEVICE)

    def convert(sums: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(sums[0, 0, order].view(out.shape))

    assert order_of_tile(convert, tile, head_dim, DEVICE).tolist() == order.tolist()


def test_an_order_that_is_none_is_noticed() -> None:
    with pytest.raises(AssertionError, match="an order that is not one"):
        order_of_tile(lambda sums, out: out.copy_(sums[0, 0, :1].expand_as(out)), 4, 8, DEVICE)


@drawn
@given(
    rows=st.integers(1, 5),
    vocab=st.sampled_from([1, 2, 37, 256, 4095, 4096, 4097, 9001]),
    dtype=dtypes,
    softcap=st.none() | st.sampled_from([1.5, 30.0]),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_loss_and_gradient(rows: int, vocab: int, dtype: torch.dtype, softcap: float | None, scale: float) -> None:
    """Vocabularies of one block, of a word more, and of several; rows that lie in wider ones."""
    torch.manual_seed(rows + vocab)
    around, logits = inside((rows, vocab), dtype)
    logits *= scale
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    targets[0], targets[-1] = 0, vocab - 1
    exact = logits.double().requires_grad_()
    capped = softcap * torch.tanh(exact / softcap) if softcap else exact
    want = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    want.sum().backward()
    losses = loss_and_gradient_(logits, targets, softcap)
    assert_close(losses, want, torch.float32, slack=1e-4)
    assert_close(logits, exact.grad, dtype, slack=2e-5)  # logits of a hundred are rounded to that in float32
    assert is_untouched(around, logits)


@pytest.mark.parametrize("vocab", [37, 5000])
def test_words_that_cannot_come_and_losses_that_are_not_finite(vocab: int) -> None:
    logits = torch.randn(3, vocab, device=DEVICE)
    logits[0, 1:30] = -INFINITY
    logits[1, 5] = float("nan")
    logits[2, 3] = -INFINITY  # the word that was wanted
    targets = torch.tensor([0, 0, 3], device=DEVICE)
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses = loss_and_gradient_(logits, targets, None)
    torch.testing.assert_close(losses, want, equal_nan=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert not logits[0, 1:30].any()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=str)
def test_a_tiled_loss_by_it(
    dtype: torch.dtype, limit: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = torch.randn(50, 16, device=DEVICE).to(dtype), torch.randn(301, 16, device=DEVICE).to(dtype)
    targets = torch.randint(0, 301, (50,), device=DEVICE)
    targets[::7] = -100
    monkeypatch.setattr(tiled_loss, "rows_of_a_tile", lambda vocab: 4)

    def loss_and_gradients(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        loss = tiled_loss._TiledCrossEntropy.apply(hidden, weight, targets, softcap)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    want = loss_and_gradients(hidden.double(), weight.double())
    monkeypatch.setattr(tiled_loss, "_is_fused", lambda hidden: True)
    got = loss_and_gradients(hidden, weight)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() < limit * w.norm()
