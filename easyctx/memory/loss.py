"""The memory of `easyctx.tiled_loss`, in bytes: a tile of logits, and the gradients that are made with it."""

from easyctx.memory.shape import MemoryShape
from easyctx.memory.working_set import Widths

LOSS_TILE = 1 << 26  # logits at a time: `easyctx.head.TILE_ELEMENTS`
FUSED_TILES = 4  # as many tiles in one where it is fused: `easyctx.tiled_loss.MORE_WHERE_FUSED`


def tiled_loss(shape: MemoryShape, widths: Widths, tokens: int, on_gpu: bool) -> int:
    """All that the loss adds to the last hidden states. On a GPU tiles are fused, and the head's gradient is a sum to
    which matrix units add half-precision products."""
    exact, compute = widths.exact, widths.compute
    head = shape.vocab * shape.hidden * shape.trains_head
    hidden, tile = tokens * compute * shape.hidden, _tile(shape, widths, tokens, on_gpu)
    if on_gpu and compute < exact:
        # A tile is gone when the head's gradient is handed on in the compute dtype.
        return hidden + head * exact + max(tile, head * compute)
    return hidden + head * (exact + compute) + tile  # its gradient, and a tile's share of it


def _tile(shape: MemoryShape, widths: Widths, tokens: int, on_gpu: bool) -> int:
    if on_gpu and widths.compute < 8:
        # The logits in the compute dtype, and their tokens' hidden states and gradients of these.
        rows = min(max(1, LOSS_TILE // shape.vocab) * FUSED_TILES, tokens)
        return rows * (shape.vocab + 2 * shape.hidden) * widths.compute
    # The logits, as they come and exactly, and their exponentials.
    each = 2 * widths.exact + widths.compute * (widths.compute < widths.exact)
    return min(LOSS_TILE, tokens * shape.vocab) * each
