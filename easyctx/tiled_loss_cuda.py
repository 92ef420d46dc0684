"""The loss of a tile of logits and its gradient, in two passes over them and in their own memory, on a GPU."""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # words at a time


@triton.jit
def _capped(x, cap, HAS_CAP: tl.constexpr):
    """cap * tanh(x / cap), and its slope."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_CAP:
        tanh = 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0
        x, slope = cap * tanh, 1.0 - tanh * tanh
    return x, slope


@triton.jit
def _loss_and_gradient(
    logits, row_stride, targets, losses, cap, vocab: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at, words = logits + row * row_stride, tl.arange(0, BLOCK)
    highest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        inside = start + words < vocab
        x, _ = _capped(tl.load(at + start + words, mask=inside, other=0.0).to(tl.float32), cap, HAS_CAP)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(highest, x)
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # places that no word has come to
        total = total * tl.exp(highest - reference) + tl.exp(x - reference)
        highest = higher
    top = tl.max(highest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    target = tl.load(targets + row)
    wanted, _ = _capped(tl.load(at + target).to(tl.float32), cap, HAS_CAP)
    tl.store(losses + row, lse - wanted)
    tl.debug_barrier()  # all warps have read the wanted logit before one of them writes over it
    for start in range(0, vocab, BLOCK):
        inside = start + words < vocab
        x, slope = _capped(tl.load(at + start + words, mask=inside, other=0.0).to(tl.float32), cap, HAS_CAP)
        gradient = (tl.exp(x - lse) - tl.where(start + words == target, 1.0, 0.0)) * slope
        tl.store(at + start + words, gradient, mask=inside)


def loss_and_gradient_(logits_RV: torch.Tensor, targets_R: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The cross-entropy of each row, float32 `[R]`; its gradient takes the place of the logits.

    Args:
        logits_RV: float32 or half precision, in one piece along V.
        targets_R: int64, each a word.
    """
    num_rows, vocab = logits_RV.shape
    assert logits_RV.stride(1) == 1
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    _loss_and_gradient[(num_rows,)](
        logits_RV, logits_RV.stride(0), targets_R.contiguous(), losses, softcap or 1.0,
        vocab=vocab, HAS_CAP=bool(softcap), BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=8,
    )  # fmt: skip
    return losses
