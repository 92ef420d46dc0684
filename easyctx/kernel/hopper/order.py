"""Reading the backward's float32 sums, whose order within a tile only the library knows.

The order is learned from the library's own conversion: sums that hold their own place go in, and where each place
comes out is noted. With that table one kernel reads any number of sums of the same rows, adds them up and rounds once.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BYTE = 256  # numbers below it are exact in both half-precision dtypes


def order_of_tile(
    convert: Callable[[torch.Tensor, torch.Tensor], None], tile: int, head_dim: int, device: torch.device
) -> torch.Tensor:
    """int32 `[tile * D]`: at which place within a tile's sums the value of (row, column) lies.

    convert: writes sums `[1, 1, tile * D]` into `[1, tile, 1, D]`, bfloat16.
    """
    places = torch.arange(tile * head_dim, device=device)

    def through(values: torch.Tensor) -> torch.Tensor:
        out = torch.empty((1, tile, 1, head_dim), dtype=torch.bfloat16, device=device)
        convert(values.float()[None, None].contiguous(), out)
        return out.flatten().long()

    order = through(places // BYTE) * BYTE + through(places % BYTE)
    assert bool((order.sort().values == places).all()), "flash-attn-4 sums its gradients in an order that is not one"
    return order.int()


@triton.jit
def _collect(
    out, out_b, out_s, out_h,
    first, first_order, first_b, first_h,
    second, second_order, second_b, second_h,
    rows, rows_b, rows_s, rows_h, positions,
    length, heads, scale,
    FIRST_TILE: tl.constexpr, SECOND_TILE: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    inside = (s < length)[:, None]
    p = s
    if HAS_POSITIONS:
        p = tl.load(positions + s, mask=s < length, other=0)
    place = tl.load(first_order + (p % FIRST_TILE)[:, None] * D + d[None, :])
    at = first + b * first_b + h * first_h + (p // FIRST_TILE)[:, None] * FIRST_TILE * D + place
    total = tl.load(at, mask=inside, other=0.0)
    if HAS_SECOND:
        place = tl.load(second_order + (s % SECOND_TILE)[:, None] * D + d[None, :])
        at = second + b * second_b + h * second_h + (s // SECOND_TILE)[:, None] * SECOND_TILE * D + place
        total += tl.load(at, mask=inside, other=0.0)
    total *= scale
    if HAS_ROWS:
        at = rows + b * rows_b + s[:, None] * rows_s + h * rows_h + d[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    at = out + b * out_b + s[:, None] * out_s + h * out_h + d[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


Sums = tuple[torch.Tensor, torch.Tensor, int]  # values [B, H, tiles * tile * D], their order, the tile


def collect(
    sums: list[Sums],
    scale: float,
    rows: torch.Tensor | None,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * (one or two sums) + rows, as `[B, S, H, D]` in `dtype`.

    rows: float32 of that shape, or None.
    out: where to, which may be `rows`; else new memory.
    positions: int64 `[S]`, which row of the sums each row is, if another one; of one sum only.
    """
    batch, length, heads, head_dim = shape
    out = torch.empty(shape, dtype=dtype, device=sums[0][0].device) if out is None else out
    (first, first_order, first_tile), (second, second_order, second_tile) = sums[0], sums[-1]
    assert positions is None or len(sums) == 1
    extra = out if rows is None else rows
    block = 32
    _collect[(triton.cdiv(length, block), batch * heads)](
        out, *out.stride()[:3],
        first, first_order, *first.stride()[:2],
        second, second_order, *second.stride()[:2],
        extra, *extra.stride()[:3], first_order if positions is None else positions,
        length, heads, scale,
        FIRST_TILE=first_tile, SECOND_TILE=second_tile, HAS_SECOND=len(sums) > 1, HAS_ROWS=rows is not None,
        HAS_POSITIONS=positions is not None, D=head_dim, BLOCK=block,
    )  # fmt: skip
    return out
