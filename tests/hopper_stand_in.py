"""Stand-ins, in plain PyTorch on a CPU, for the Hopper kernels, with all that makes those awkward.

Sums of gradients lie tile after tile, shuffled within a tile; tiles of dq differ between blocks with and without a
mask; a tile that begins inside the queries but ends beyond them reads whatever statistics come next, and adds to dq
what follows from these. `install` puts them in the place of the modules that import flash-attn-4.
"""

import itertools
import sys
import types
from typing import NamedTuple

import torch

from easyctx.band import Band
from easyctx.kernel import KERNELS, Saved, Score
from easyctx.kernel.base import squares
from easyctx.kernel.merge import merge
from easyctx.kernel.tiled import Tiled

TILE_MASKED, TILE_FULL, TILE_KEYS = 4, 5, 8
BACKWARD = ("Statistics", "tile_rows", "tile_keys", "new_sums", "new_statistic", "prepare", "differentiate")
BACKWARD += ("differentiate_packed", "differentiate_apart", "order_of_rows", "order_of_keys")


class Statistics(NamedTuple):
    dpsum: torch.Tensor
    lse_log2: torch.Tensor


def band_of(causal, left, right, num_queries, num_keys) -> Band:
    lead = num_keys - num_queries
    right = 0 if causal else right
    return Band(None if left is None else lead - left, None if right is None else lead + right)


def attend(q, k, v, out, rest, lse, *, scale, softcap, causal, left, right, cu_seqlens, is_first, keeps_rest):
    packed = cu_seqlens is not None
    if packed:
        q, k, v, out, lse = (t.unsqueeze(0) for t in (q, k, v, out, lse))
        rest = None if rest is None else rest.unsqueeze(0)
    stretches = list(squares(tuple(cu_seqlens.tolist()))) if packed else [slice(None)]
    for s in stretches:
        # The library counts windows from the corner of each square.
        keys = k[:, s] if packed else k
        values = v[:, s] if packed else v
        band = band_of(causal, left, right, q[:, s].shape[1], keys.shape[1])
        block_out, block_lse = masked_attention(q[:, s], keys, values, band, Score(scale, softcap))
        total = block_out.double()
        total_lse = block_lse.double()
        if not is_first:
            before = out[:, s].double() + rest[:, s].double()
            before_lse = lse[:, :, s].double()
            merge(before, before_lse, total, total_lse)
            total, total_lse = before, before_lse
        out[:, s] = total.to(torch.bfloat16)
        lse[:, :, s] = total_lse
        if keeps_rest:
            rest[:, s] = total - out[:, s]
        elif rest is not None:
            rest[:, s] = float("nan")


def masked_attention(q, k, v, band, score):
    """The tiled kernel's, also of queries that see no key: 0 and -inf."""
    mask = band.allowed(q.shape[1], k.shape[1]).any(1)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=q.dtype)
    if mask.any():
        first, last = int(mask.nonzero()[0]), int(mask.nonzero()[-1]) + 1
        assert mask[first:last].all()
        edges = [None if edge is None else edge + first for edge in (band.low, band.high)]
        part_out, part_lse = KERNELS["reference"].forward(q[:, first:last], k, v, Band(*edges), score)
        out[:, first:last], lse[:, :, first:last] = part_out, part_lse
    return out, lse


def tile_rows(head_dim, *, is_full):
    return TILE_FULL if is_full else TILE_MASKED


def tile_keys(head_dim):
    return TILE_KEYS


def new_sums(length, tile, like):
    batch, _, heads, head_dim = like.shape
    return torch.full((batch, heads, -(-length // tile) * tile * head_dim), float("nan"), dtype=torch.float32)


def new_statistic(shape, device):
    return torch.full(shape, float("nan"))


def prepare(out, dout, lse, tile):
    batch, length, heads, head_dim = out.shape
    sums = new_sums(length, tile, out).zero_()
    shape = (batch, heads, sums.shape[2] // head_dim)
    statistics = Statistics(torch.zeros(shape), torch.full(shape, float("inf")))
    statistics.dpsum[:, :, :length] = (out.double() * dout.double()).sum(-1).transpose(1, 2)
    statistics.lse_log2[:, :, :length] = lse
    return statistics, sums


def order(tile, head_dim):
    return torch.randperm(tile * head_dim, generator=torch.Generator().manual_seed(tile))


def add_to_sums(sums, values, tile):
    """values [B, H, rows, D] into sums, in their order; rows of whole tiles."""
    batch, heads, rows, head_dim = values.shape
    tiles = values.reshape(batch, heads, rows // tile, tile * head_dim)
    shuffled = torch.empty_like(tiles)
    shuffled[..., order(tile, head_dim)] = tiles
    sums += shuffled.flatten(2).to(sums.dtype)


def differentiate(
    q, k, v, dout, statistics, dq_sums, dk_sums, dv_sums, *, scale, softcap, is_full, causal, left, right
):
    head_dim, tile = q.shape[3], tile_rows(q.shape[3], is_full=is_full)
    assert not (is_full and (causal or left is not None or right is not None))
    rows = -(-q.shape[1] // tile) * tile
    assert dq_sums.shape[2] == rows * head_dim
    group = q.shape[2] // k.shape[2]

    def beyond(x, fill, dim):
        shape = list(x.shape)
        shape[dim] = rows - x.shape[dim]
        return torch.cat([x.double(), torch.full(shape, fill, dtype=torch.float64)], dim) if shape[dim] > 0 else x

    q_, dout_ = (beyond(t, 0.0, 1).double().transpose(1, 2) for t in (q, dout))
    dpsum, lse = (beyond(t, 0.0, 2).double()[:, :, :rows, None] for t in statistics)
    k_, v_ = (t.double().repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    scores, slope = q_ @ k_.mT * scale, 1.0
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped**2
    band = band_of(causal, left, right, q.shape[1], k.shape[1])
    p = (scores - lse).exp().masked_fill(~band.allowed(rows, k.shape[1]), 0.0)
    ds = p * (dout_ @ v_.mT - dpsum) * slope
    add_to_sums(dq_sums, ds @ k_, tile)
    for sums, gradient in ((dk_sums, ds.mT @ q_), (dv_sums, p.mT @ dout_)):
        of_keys = gradient.unflatten(1, (k.shape[2], group)).sum(2)
        pad = -(-k.shape[1] // TILE_KEYS) * TILE_KEYS - k.shape[1]
        add_to_sums(sums, torch.nn.functional.pad(of_keys, (0, 0, 0, pad)), TILE_KEYS)


def differentiate_apart(saved, dout, dq, dk, dv, *, scale, softcap, is_full, causal, left, right):
    q, k, _, out, lse = saved
    tile = tile_rows(q.shape[3], is_full=is_full)
    statistics, dq_sums = prepare(out, dout, lse, tile)
    dk_sums, dv_sums = (new_sums(k.shape[1], TILE_KEYS, k).zero_() for _ in range(2))
    mask = dict(is_full=is_full, causal=causal, left=left, right=right)
    differentiate(*saved[:3], dout, statistics, dq_sums, dk_sums, dv_sums, scale=scale, softcap=softcap, **mask)
    for rows, sums, size, factor in (
        (dq, dq_sums, tile, scale), (dk, dk_sums, TILE_KEYS, scale), (dv, dv_sums, TILE_KEYS, 1.0)
    ):  # fmt: skip
        rows.copy_(collect([(sums, order(size, q.shape[3]), size)], factor, rows, rows.shape, rows.dtype))


def differentiate_packed(saved, dout, dq, dk, dv, cuts, *, scale, softcap, causal, left, right):
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    band = band_of(causal, left, right, longest, longest)
    whole = Saved(*(t.unsqueeze(0) for t in saved))
    more = KERNELS["tiled"].backward_packed(dout.unsqueeze(0), whole, cuts, band, Score(scale, softcap))
    for into, gradient in zip((dq, dk, dv), more, strict=True):
        into += gradient[0]


def order_of_rows(head_dim, tile, device):
    return order(tile, head_dim)


def order_of_keys(head_dim, device):
    return order(TILE_KEYS, head_dim)


def collect(sums, scale, rows, shape, dtype):
    batch, length, heads, head_dim = shape
    total = torch.zeros((batch, heads, length, head_dim), dtype=torch.float64)
    for values, places, tile in sums:
        tiles = values.double().unflatten(2, (-1, tile * head_dim))[..., places]
        total += tiles.reshape(batch, heads, -1, head_dim)[:, :, :length]
    total = total.transpose(1, 2) * scale
    return (total if rows is None else total + rows).to(dtype)


class StandIn(Tiled):
    """A kernel that keeps its sums as flash-attn-4 does on a Hopper, and computes with float32."""

    name = "stand_in"
    key_tile = TILE_KEYS

    def output(self, q_BSHD, score, *, unrounded=False):
        from easyctx.kernel.hopper.output import HopperOutput

        return HopperOutput(self, q_BSHD, score, unrounded=unrounded)

    def gradients(self, dout_BSHD, saved, score, *, unrounded=False):
        from easyctx.kernel.hopper.gradients import HopperGradients

        return HopperGradients(self, dout_BSHD, saved, score, unrounded=unrounded)


def install(monkeypatch) -> StandIn:
    """The stand-in kernel; `easyctx.kernel.hopper` is imported anew around it, and again after the test."""
    package = "easyctx.kernel.hopper"
    modules = {
        "forward": {"attend": attend},
        "backward": {name: globals()[name] for name in BACKWARD},
        "order": {"collect": collect},
    }
    for name in ("output", "gradients"):
        monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
    import easyctx.kernel.hopper as hopper

    for name, contents in modules.items():
        module = types.ModuleType(f"{package}.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"{package}.{name}", module)
        monkeypatch.setattr(hopper, name, module, raising=False)
    return StandIn()
