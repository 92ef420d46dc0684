"""The functional entry points on real ranks, against dense attention; and what they refuse."""

import re

import pytest
import torch
import torch.distributed as dist

import easyctx.functional as functional
from easyctx.documents import Documents
from easyctx.mask import Mask
from easyctx.modes import MODES
from tests.test_layout import visible_pairs
from tests.test_parity import SHARDED_MODES

LENGTH, SCALE = 48, 0.4


def whole_tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def dense(q, k, v, sinks, mask, softcap):
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible_pairs(mask, LENGTH, 2)[:, None], float("-inf"))
    with_sinks = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", with_sinks.softmax(-1)[..., :-1], v), with_sinks.logsumexp(-1)


def everything_at_once(rank, world, mode):
    """Window, documents, sinks, softcap, GQA, over a group of the first three of four ranks."""
    group = dist.new_group([0, 1]) if world > 2 else None
    if rank > 1:
        return
    ring_degree = 2 if mode == "usp_attn" else None
    q, k, v, dout = whole_tensors()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    documents = Documents(LENGTH, ((0, 7, 30), (0, 7, 30)))
    inputs = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
    want, want_lse = dense(*inputs, Mask(9, documents), 2.0)
    want.backward(dout)

    layout = MODES[mode].shard_layout(2, ring_degree)
    mine = [layout.shard(t, 2, rank).requires_grad_() for t in (q, k, v)]
    own_sinks = sinks.clone().requires_grad_()
    out, lse = getattr(functional, f"{mode}_func")(
        *mine,
        window_size=(8, 0),
        softmax_scale=SCALE,
        softcap=2.0,
        sinks=own_sinks,
        cu_seqlens=[0, 7, 30, LENGTH],
        group=group,
        ring_degree=ring_degree,
        return_lse=True,
    )
    out.backward(layout.shard(dout, 2, rank))
    dist.all_reduce(own_sinks.grad, group=group)
    close = dict(rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out, layout.shard(want, 2, rank), **close)
    torch.testing.assert_close(lse, layout.shard(want_lse, 2, rank, dim=2), **close)
    for got, whole in zip(mine, inputs, strict=False):
        torch.testing.assert_close(got.grad, layout.shard(whole.grad, 2, rank), **close)
    torch.testing.assert_close(own_sinks.grad, inputs[3].grad, **close)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_against_dense_attention(ranks, mode, world):
    ranks(world).run(everything_at_once, mode)


def compiled(rank, world):
    q, k, v, _ = (t[:, : LENGTH // world] for t in whole_tensors())
    plain = functional.zigzag_ring_attn_func(q, k, v)
    traced = torch.compile(lambda *t: functional.zigzag_ring_attn_func(*t) * 2, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(traced, 2 * plain)


def test_inside_torch_compile(ranks):
    ranks(2).run(compiled)


def refusals(rank, world):
    q, k, v, _ = (t[:, :4] for t in whole_tensors())
    cases = [
        ("zigzag_ring_attn", (q, k.float(), v), {}),
        ("zigzag_ring_attn", (q, k[:, :2], v), {}),
        ("zigzag_ring_attn", (q[:, :, :3], k, v), {}),
        ("ring_attn", (q, k, v), {"causal": False}),
        ("ring_attn", (q, k, v), {"window_size": (3, 2)}),
        ("ring_attn", (q, k, v), {"cu_seqlens": [0, 5, 8]}),
        ("ring_attn", (q, k, v), {"documents": Documents(9, ((0,),))}),
        ("zigzag_ring_attn", tuple(t[:, :3] for t in (q, k, v)), {}),
        ("usp_attn", (q, k, v), {}),
        ("usp_attn", (q, k, v), {"ring_degree": 2}),
        ("ulysses_attn", (q, k, v), {}),
        ("ring_attn", (q, k, v), {"kernel": "cudnn"}),
    ]
    messages = []
    for mode, tensors, settings in cases:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            getattr(functional, f"{mode}_func")(*tensors, **settings)
        messages.append(str(error.value))
    return messages


def test_refusals(ranks):
    expected = [
        "mixed dtypes: q torch.float64, k torch.float32",
        "q has shape (2, 4, 4, 8), k (2, 2, 2, 8)",
        "3 query heads are no multiple of 2 key/value heads",
        "causal=False",
        "window_size is (3, 2)",
        "cu_seqlens end at 8, but the row has 12 tokens",
        "documents are those of rows of 9 tokens, but the rows have 12",
        "multiple of 6, got 9: pad to 12",
        "usp_attn needs a ring degree",
        "ring degree of 2 does not divide the 3 ranks",
        "cannot share 4 query and 2 key/value heads out to 3 ranks: use a Ulysses degree of 1, 2, 4",
        "'cudnn' runs on CUDA only",
    ]
    for want, got in zip(expected, ranks(3).run(refusals)[0], strict=True):
        assert want in got


@pytest.mark.parametrize("name", functional.__all__)
@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((2, 4, 4, 8), (1, 4, 2, 8), (2, 4, 2, 8)), "batch of q 2, of k 1"),
        (((2, 4, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)), "tokens of q 4, of k 6"),
        (((2, 4, 4, 8), (2, 4, 2, 8), (2, 3, 2, 8)), "tokens of v 3, of k 4"),
        (((2, 4, 4, 8), (2, 4, 2, 8), (2, 4, 1, 8)), "heads of v 1, of k 2"),
        (((2, 4, 4, 8), (2, 4, 2, 16), (2, 4, 2, 16)), "head dim of q 8, of k 16"),
        (((2, 4, 4, 8), (4, 2, 8), (4, 2, 8)), "give each as [batch, tokens, heads, head dim]"),
        (((2, 4, 4, 8), (2, 4, 0, 8), (2, 4, 0, 8)), "4 query heads are no multiple of 0 key/value heads"),
        (((2, 4, 3, 8), (2, 4, 2, 8), (2, 4, 2, 8)), "3 query heads are no multiple of 2 key/value heads"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shapes, said):
    mode = ("ring_attn",) if name == "seq_parallel_attn_func" else ()
    with pytest.raises(ValueError, match=re.escape(said)):
        getattr(functional, name)(*mode, *(torch.zeros(shape) for shape in shapes))


def test_sinks_are_one_a_head():
    q = torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match=re.escape("sinks has shape (2,), and q 4 heads")):
        functional.ring_attn_func(q, q, q, sinks=torch.zeros(2))
