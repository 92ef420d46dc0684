"""A kernel held against the float64 reference on problems so small that it can be done before a run."""

from collections.abc import Iterator

import torch

from easyctx.band import CAUSAL, FULL, Band, Block
from easyctx.kernel.base import Kernel
from easyctx.kernel.reference import Reference
from easyctx.kernel.values import Saved, Score, exact_dtype

HEADS, KV_HEADS, LENGTH = 4, 2, 176
CUTS = (0, 1, 70, LENGTH)  # one document has one token
Problem = tuple[int, int, Band, tuple[int, ...]]  # queries, keys, mask, cuts of a chain


def disagreement(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 64,
    *,
    windowed: bool = False,
    softcapped: bool = False,
    packed: bool = False,
) -> float:
    """The largest relative error of out, lse, dq, dk and dv over the blocks that such attention is made of.

    The backward is given the reference's out and lse plus what further keys would add: a merged one, as in a ring.
    """
    score = Score(head_dim**-0.5, 5.0 if softcapped else None)
    return max(_error(kernel, device, dtype, head_dim, problem, score) for problem in _problems(windowed, packed))


def _problems(windowed: bool, packed: bool) -> Iterator[Problem]:
    yield LENGTH, LENGTH, CAUSAL, ()
    yield 100, LENGTH, FULL, ()  # as in a ring
    if windowed:
        yield LENGTH, LENGTH, Band(-40, 0), ()
        yield 100, LENGTH, Band(low=30), ()  # of an earlier shard's keys, the window's share
        yield LENGTH, 60, Band(low=-120), ()
    if packed:
        yield LENGTH, LENGTH, CAUSAL, CUTS
    if packed and windowed:
        yield LENGTH, LENGTH, Band(-40, 0), CUTS


def _error(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, problem: Problem, score: Score
) -> float:
    num_queries, num_keys, band, cuts = problem
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, num_queries, HEADS), (1, num_keys, KV_HEADS), (1, num_keys, KV_HEADS), (1, num_queries, HEADS)]
    made = (torch.randn((*s, head_dim), generator=generator, dtype=torch.float32, device="cpu") for s in shapes)
    q, k, v, dout = (t.to(dtype).to(device) for t in made)
    reference, block = Reference(), Block(slice(0, num_queries), slice(0, num_keys), band, cuts=cuts)
    exact_q, exact_k, exact_v = (t.double() for t in (q, k, v))
    out, lse = reference.forward_block(exact_q, exact_k, exact_v, block, score)
    rounded, merged = out.to(dtype), lse + 0.5
    saved = Saved(q, k, v, rounded, merged.to(exact_dtype(dtype)))
    exact_saved = Saved(exact_q, exact_k, exact_v, rounded.double(), merged)
    want = (out, lse, *reference.backward_block(dout.double(), exact_saved, block, score))
    got = (*kernel.forward_block(q, k, v, block, score), *kernel.backward_block(dout, saved, block, score))
    return max(_relative(a, b) for a, b in zip(got, want, strict=True))


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else float("inf")  # NaN is the largest error of all
