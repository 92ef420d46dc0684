"""Bytes of one token in one layer: what is kept of it, and what exists while it is computed.

Legend: d width of the residual stream, q values of a token's queries, kv of its keys and values, f of its MLP.
All counts are of stock transformers modules in PyTorch's eager mode, as autograd holds on to them. Where layers differ
(`MemoryShape.kinds`), a shape is that of one layer: `MemoryShape.of_layer`.
"""

from collections.abc import Collection
from dataclasses import dataclass

from easyctx.memory.choices import Choices, LayerChoice
from easyctx.memory.matrices import ATTENTION, INTO_ATTENTION, INTO_MLP, MLP, OUT_OF_ATTENTION, OUT_OF_MLP
from easyctx.memory.shape import MemoryShape

# What a kernel's backward allocates beside its arguments, in bytes a value of q and of kv.
# flash4 on Hopper adds to float32 sums that count elsewhere (`easyctx.kernel.hopper`); block by block it makes sums of
# its own, and converts them twice (`easyctx.kernel.flash4`). torch_flash and flash2: dk, dv for every query
# head.
BY_BLOCKS = "flash4 by blocks"
_KERNEL_BACKWARD = {
    "flash4": (0, 0),
    BY_BLOCKS: (16, 10),
    "cudnn": (6, 2),
    "torch_flash": (10, 2),
    "flash2": (10, 2),
    "torch_cpu": (4, 4),
    "tiled": (8, 8),
    "reference": (8, 8),
}


@dataclass(frozen=True)
class Widths:
    """Bytes of one value.

    compute: of what matrices multiply (2 for bfloat16).
    stream: of the residual stream; 4 where autocast runs over float32 weights, else as `compute`.
    """

    compute: int = 2
    stream: int = 2

    @property
    def exact(self) -> int:
        """Of sums and log-sum-exps: float32, float64 for float64."""
        return max(4, self.compute)


def kept_inputs(shape: MemoryShape, widths: Widths) -> int:
    """A layer's input."""
    return widths.stream * shape.hidden


def kept_attention(shape: MemoryShape, widths: Widths) -> int:
    """Attention's output and log-sum-exp."""
    return widths.compute * shape.q_width + widths.exact * shape.q_heads


def keeps_little(shape: MemoryShape, choices: Choices) -> bool:
    """Whether norms keep their input alone."""
    return choices.tiled_norms or shape.fused


def norm_kept(width: int, widths: Widths, tiled: bool, frozen: bool = False) -> int:
    """What an RMS norm keeps beside its input and output: a float32 copy, and its result before a trained weight."""
    if tiled:
        return 0
    return (4 * width if widths.stream < 4 else 0) + (not frozen) * widths.stream * width


def norm_input(width: int, widths: Widths, tiled: bool) -> int:
    """An RMS norm's input, if it is kept: not where the norm works on a float32 copy, since sums keep nothing."""
    return widths.stream * width if tiled or widths.stream >= 4 else 0


def operands(shape: MemoryShape, widths: Widths, choices: Choices) -> tuple[int, int]:
    """What the matrices behind the two norms keep of their input: attention's, and the MLP's.

    One tensor for all; under autocast each matrix keeps a converted copy of its own. A frozen matrix keeps none, its
    adapter does.
    """
    shared = widths.compute * shape.hidden
    attention, mlp = len(shape.trained_among(INTO_ATTENTION)), len(shape.trained_among(INTO_MLP))
    if shape.is_mixture:
        mlp = 2 * shape.trains_experts
    if widths.stream == widths.compute:
        return shared * bool(attention), shared * bool(mlp or choices.mlp_tile)
    return attention * shared, widths.stream * shape.hidden if choices.mlp_tile else mlp * shared


def narrow(shape: MemoryShape, widths: Widths, names: Collection[str]) -> int:
    """What adapters of these matrices keep between their own two: as many values as their rank."""
    return 0 if shape.adapters is None else widths.compute * shape.adapters.rank * len(shape.trained_among(names))


def added(shape: MemoryShape, widths: Widths, name: str) -> int:
    """What a matrix's result has beside it while its adapter's is scaled and added."""
    if shape.adapters is None:
        return 0
    return sum(2 * widths.compute * matrix.outputs for matrix in shape.targets if matrix.name == name)


def mlp_width(shape: MemoryShape) -> int:
    """Values of a token's MLP activations, over the experts that it goes to."""
    return shape.active_experts * shape.intermediate


def kept_everything(shape: MemoryShape, widths: Widths, choices: Choices) -> int:
    """All that an unchecked layer keeps: inputs of norms and matrices, q, k, v, out, lse, four times the MLP."""
    d, c = shape.hidden, widths.compute
    norms = 2 * norm_input(d, widths, keeps_little(shape, choices)) + shape.norms * layer_norm_kept(
        shape, widths, choices
    )
    norms += sum(operands(shape, widths, choices)) + (shape.norms - 2) * c * d
    heads = shape.q_width + shape.kv_width
    total = norms + c * heads + kept_attention(shape, widths)
    total += _head_norms(shape, widths) + narrow(shape, widths, ATTENTION)
    return total + (0 if choices.mlp_tile else mlp_kept(shape, widths))


def mlp_kept(shape: MemoryShape, widths: Widths) -> int:
    """Activations of an MLP: before and after the activation function, its factor, and their product for a gradient."""
    product = shape.trains_experts if shape.is_mixture else len(shape.trained_among(OUT_OF_MLP))
    return (3 - shape.fused_mlp + product) * widths.compute * mlp_width(shape) + narrow(shape, widths, MLP)


def layer_norm_kept(shape: MemoryShape, widths: Widths, choices: Choices) -> int:
    """`norm_kept` of one of a layer's norms."""
    return norm_kept(shape.hidden, widths, keeps_little(shape, choices), not shape.keeps_normed)


def kept_of(layer: LayerChoice, shape: MemoryShape, widths: Widths, choices: Choices) -> dict[str, int]:
    """Bytes of one token that this layer leaves until its backward, by place ("gpu", "host")."""
    if layer.everything:
        return {"gpu": kept_everything(shape, widths, choices), "host": 0}
    parts = ((layer.inputs, kept_inputs(shape, widths)), (layer.attention, kept_attention(shape, widths)))
    return {place: sum(size for where, size in parts if where == place) for place in ("gpu", "host")}


def _head_norms(shape: MemoryShape, widths: Widths) -> int:
    if not shape.head_norms:
        return 0
    width = shape.q_width + shape.kv_width // 2
    return norm_kept(width, widths, tiled=shape.fused, frozen=not shape.keeps_normed) + widths.compute * width


def attention_inside(shape: MemoryShape, widths: Widths, kernel: str, ring: int, ulysses: int, groups: int) -> int:
    """What the attention operator's backward allocates beside its arguments and results."""
    of_q, of_kv = _KERNEL_BACKWARD.get(kernel, _KERNEL_BACKWARD[BY_BLOCKS])
    q, kv, c = shape.q_width, shape.kv_width, widths.compute
    inside = (of_q + widths.exact) * q + (of_kv + widths.exact) * kv + 2 * widths.exact * shape.q_heads
    if ring > 1:  # keys, and the sums of their gradients, on their way
        inside += 2 * c * kv + widths.exact * kv
        inside += (kernel == "flash4") * widths.exact * q  # blocks without a mask have sums of their own
    if ulysses > 1:  # all arguments, sent and received
        inside += 2 * c * (3 * q + kv)
    # A group's arguments are copied out of the whole.
    return inside // groups + (c * (3 * q + kv) // groups if groups > 1 else 0)


def backward_of_attention(
    shape: MemoryShape, widths: Widths, choices: Choices, kernel: str, ring: int = 1, ulysses: int = 1
) -> int:
    """The layer while attention's backward runs, without its kept input, output and log-sum-exp."""
    d, c, heads = shape.hidden, widths.compute, shape.q_width + shape.kv_width
    gradients = widths.stream * d + c * shape.q_width + c * heads
    inside = attention_inside(shape, widths, kernel, ring, ulysses, choices.head_groups)
    return before_attention(shape, widths, choices) + gradients + inside


def before_attention(shape: MemoryShape, widths: Widths, choices: Choices) -> int:
    """What a rerun layer keeps up to attention: the first norm, the operands of its matrices, q, k and v."""
    heads = widths.compute * (shape.q_width + shape.kv_width) + _head_norms(shape, widths)
    of_matrices, _ = operands(shape, widths, choices)
    return layer_norm_kept(shape, widths, choices) + of_matrices + heads + narrow(shape, widths, INTO_ATTENTION)


def backward_of_mlp(shape: MemoryShape, widths: Widths, choices: Choices) -> int:
    """The layer while the MLP's backward runs, without its kept input, output and log-sum-exp."""
    d, c = shape.hidden, widths.compute
    _, of_mlp = operands(shape, widths, choices)
    norm = norm_input(d, widths, keeps_little(shape, choices)) + layer_norm_kept(shape, widths, choices)
    after = norm + of_mlp + narrow(shape, widths, OUT_OF_ATTENTION)  # the stream, the second norm
    gradients = widths.stream * d + c * d
    inside = 0 if choices.mlp_tile else mlp_inside(shape, widths)
    return before_attention(shape, widths, choices) + after + gradients + inside


def backward_of_unchecked(
    shape: MemoryShape, widths: Widths, choices: Choices, kernel: str, ring: int = 1, ulysses: int = 1
) -> int:
    """What the backward of a layer that kept everything allocates: gradients, and the attention operator's inside."""
    d, c = shape.hidden, widths.compute
    inside = attention_inside(shape, widths, kernel, ring, ulysses, choices.head_groups)
    # Attention's turn comes when what the MLP had kept is gone.
    gone = 0 if choices.mlp_tile else mlp_kept(shape, widths)
    attention = widths.stream * d + c * (2 * shape.q_width + shape.kv_width) + inside - gone
    mlp = widths.stream * d + c * d + (0 if choices.mlp_tile else 2 * c * mlp_width(shape))
    return max(attention, mlp)


def mlp_inside(shape: MemoryShape, widths: Widths) -> int:
    """The MLP's activations and their gradients at the worst moment of its backward, for one token."""
    gathered = 2 * shape.active_experts * shape.hidden * widths.compute if shape.is_mixture else 0
    small = narrow(shape, widths, MLP)
    return (6 - shape.fused_mlp) * widths.compute * mlp_width(shape) + gathered + small


def forward_of_layer(shape: MemoryShape, widths: Widths, choices: Choices, ring: int = 1) -> int:
    """The layer while its forward runs without a graph: its input, and the largest of norm, attention and MLP."""
    d, c, q, kv = shape.hidden, widths.compute, shape.q_width, shape.kv_width
    merging = (2 * widths.exact + c) * q + 2 * c * kv if ring > 1 else c * q
    merging = merging // choices.head_groups + (c * q if choices.head_groups > 1 else 0)
    turning = 3 * c * q  # RoPE's products and their sum
    after = c * q + c * d + added(shape, widths, "o_proj")
    attention = c * d + c * (q + kv) + max(merging, turning, after)
    mlp = widths.stream * d + 2 * c * d
    if not choices.mlp_tile:
        mlp += max(3 * c * mlp_width(shape) + added(shape, widths, "up_proj"), added(shape, widths, "down_proj"))
    norm = widths.stream * d + (0 if keeps_little(shape, choices) else 2 * 4 * d) + c * d
    return widths.stream * d + max(attention, mlp, norm)
