"""The error of a method against float64, at any length: from a sample of query rows.

dout is zero but in the sampled rows. Then out and dq of these rows, and dk and dv of every key, follow from these rows
alone, and float64 attention costs as much as one short block.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from attention_parts.cases import Case
from attention_parts.methods import Method, Tensors
from easyctx.mesh import num_processes

NAMES = ("out", "dq", "dk", "dv")


def sampled_errors(method: Method, case: Case, rank: int, num_rows: int) -> dict[str, float]:
    """Relative errors (Frobenius norm, all heads) of out and dq in `num_rows` rows, and of dk and dv in all."""
    rows = sample(case, num_rows)
    mine = method.layout.positions(case.length, case.ranks, rank).to(case.device)
    is_sampled = torch.isin(mine, rows)
    q, k, v, dout = case.shards(method.layout, rank)
    dout = dout * is_sampled[None, :, None, None]
    with method.context():
        state = method.forward(q, k, v)
        dq, dk, dv = (t.detach() for t in method.backward(state, dout))
    got = (state[0].detach()[0, is_sampled], dq[0, is_sampled], dk[0], dv[0])
    del state, q, k, v, dout
    sums = torch.zeros(4, 2, dtype=torch.float64, device=case.device)
    held = torch.isin(rows, mine)
    group = case.heads[0] // case.heads[1]
    for head, (out, dq, dk, dv) in enumerate(truth(case, rows, mine)):
        queries = slice(head * group, (head + 1) * group)
        want = (out[held], dq[held], dk, dv)
        parts = (got[0][:, queries], got[1][:, queries], got[2][:, head], got[3][:, head])
        for i, (g, w) in enumerate(zip(parts, want, strict=True)):
            sums[i] += torch.stack([(g.double() - w).square().sum(), w.square().sum()])
    if num_processes() > 1:
        dist.all_reduce(sums)
    return dict(zip(NAMES, (sums[:, 0] / sums[:, 1]).sqrt().tolist(), strict=True))


def sample(case: Case, num_rows: int) -> torch.Tensor:
    """Ascending positions, the same on every rank; the last one, which sees most, is among them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(case.length - 1, generator=generator)[: min(num_rows, case.length) - 1]
    return torch.cat([rows.sort().values, torch.tensor([case.length - 1])]).to(case.device)


def truth(case: Case, rows: torch.Tensor, keys: torch.Tensor) -> Iterator[Tensors]:
    """For each key/value head in turn, in float64: out and dq `[rows, H/K, D]`, dk and dv `[keys, D]`."""
    q, dout = (case.whole(name)[0, rows].double() for name in ("q", "dout"))
    k_SKD, v_SKD = case.whole("k")[0], case.whole("v")[0]
    positions = torch.arange(case.length, device=case.device)
    hidden = (positions > rows[:, None]) | (positions < case.first_keys(rows)[:, None])
    scale, group = case.head_dim**-0.5, case.heads[0] // case.heads[1]
    for head in range(case.heads[1]):
        k, v = k_SKD[:, head].double(), v_SKD[:, head].double()
        q_rgd, dout_rgd = (t[:, head * group : (head + 1) * group] for t in (q, dout))
        scores = (q_rgd @ k.T).mul_(scale).masked_fill_(hidden[:, None], float("-inf"))
        p = scores.softmax(-1)
        out = p @ v
        ds = p * (dout_rgd @ v.T - (out * dout_rgd).sum(-1, keepdim=True)) * scale
        dk = torch.einsum("rgs,rgd->sd", ds[..., keys], q_rgd)
        dv = torch.einsum("rgs,rgd->sd", p[..., keys], dout_rgd)
        yield out, ds @ k, dk, dv


def largest(errors: dict[str, float]) -> dict[str, float]:
    """As columns of a row: the largest, and each."""
    return {"error": max(errors.values())} | {f"{name}_error": value for name, value in errors.items()}
