"""What pinned host memory takes beyond what is asked for: PyTorch gives every tensor a power of two."""

from math import prod

from easyctx.memory.engines import get_engine
from easyctx.memory.matrices import MLP
from easyctx.memory.setting import Setting
from easyctx.memory.shape import MemoryShape


def rounded_away(shape: MemoryShape, setting: Setting) -> int:
    """Bytes of one rank that offloaded weights and their gradients take beyond their sizes; 0 where none are pinned."""
    if not (get_engine(setting.engine).pins and setting.pins):
        return 0
    copies = 2 if shape.adapters is None else 1  # of adapters alone the gradients are small
    return copies * sum(
        count * _rounding(int(-(-rows // setting.ranks) * columns * each))
        for rows, columns, count, each in _weights(shape, setting.weight_bytes)
    )


def _rounding(size: int) -> int:
    return (1 << (size - 1).bit_length()) - size


def _weights(shape: MemoryShape, each: int) -> list[tuple[int, int, int, float]]:
    """Rows (by which ranks share them), columns, number of alike ones, bytes of a weight; norms and biases are too
    small to count.

    A layer's matrices, which alone are quantised, a mixture's experts (one tensor for two of their matrices, one for
    the third), the embedding and the head.
    """
    is_quantized = shape.adapters is not None and shape.adapters.quantize is not None
    found = [(m.outputs, m.inputs, m.layers, 0.5 if is_quantized else each) for m in shape.matrices]
    if shape.is_mixture:
        dense = next((m.layers for m in shape.matrices if m.name in MLP), 0)
        one = shape.intermediate * shape.hidden
        found += [(shape.experts, columns, shape.num_layers - dense, each) for columns in (2 * one, one)]
    of_vocab = (shape.vocab, shape.hidden)
    return [*found, (*of_vocab, shape.outer_parameters // prod(of_vocab), each)]
