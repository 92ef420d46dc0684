"""`merge` as one pass over the output, on a GPU."""

import torch
import triton
import triton.language as tl


@triton.jit
def _merge(
    out, out_b, out_s, out_h,
    lse, lse_b, lse_h, lse_s,
    more, more_b, more_s, more_h,
    more_lse, more_lse_b, more_lse_h, more_lse_s,
    length, heads,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, COLUMNS)
    row_inside = s < length
    inside = row_inside[:, None] & (d < D)[None, :]
    at_lse = lse + b * lse_b + h * lse_h + s * lse_s
    old = tl.load(at_lse, mask=row_inside, other=0.0)
    new = tl.load(more_lse + b * more_lse_b + h * more_lse_h + s * more_lse_s, mask=row_inside, other=0.0)
    tl.debug_barrier()  # all warps have read a log-sum-exp, of which each has a copy, before one of them writes it
    highest = tl.maximum(old, new)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    keep, take = tl.exp(old - reference), tl.exp(new - reference)
    both = keep + take
    inverse = tl.where(both > 0, 1.0 / both, 0.0)
    tl.store(at_lse, tl.where(both > 0, reference + tl.log(both), float("-inf")), mask=row_inside)
    at = out + b * out_b + s[:, None] * out_s + h * out_h + d[None, :]
    at_more = more + b * more_b + s[:, None] * more_s + h * more_h + d[None, :]
    total = tl.load(at, mask=inside, other=0.0) * (keep * inverse)[:, None]
    total += tl.load(at_more, mask=inside, other=0.0).to(tl.float32) * (take * inverse)[:, None]
    tl.store(at, total, mask=inside)


def merge_fused(
    out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, more_out_BSHD: torch.Tensor, more_lse_BHS: torch.Tensor
) -> None:
    """As `easyctx.kernel.merge.merge`: out and lse float32, more_out in any dtype."""
    batch, length, heads, head_dim = out_BSHD.shape
    more = more_out_BSHD if more_out_BSHD.stride(-1) == 1 else more_out_BSHD.contiguous()
    assert out_BSHD.stride(-1) == 1
    block = 32
    _merge[(triton.cdiv(length, block), batch * heads)](
        out_BSHD, *out_BSHD.stride()[:3],
        lse_BHS, *lse_BHS.stride(),
        more, *more.stride()[:3],
        more_lse_BHS, *more_lse_BHS.stride(),
        length, heads,
        D=head_dim, COLUMNS=triton.next_power_of_2(head_dim), BLOCK=block,
    )  # fmt: skip
