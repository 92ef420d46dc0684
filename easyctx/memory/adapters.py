"""What LoRA changes in the count of a model: weights that are frozen, or of 4 bits, and adapters beside them."""

from dataclasses import replace
from typing import Any

from easyctx.adapters.folder import is_adapter
from easyctx.memory.matrices import INTO_MLP, MLP, OUT_OF_MLP, Adapters, Matrix
from easyctx.memory.shape import MemoryShape

# NF4 (arXiv 2305.14314): half a byte a weight and a float32 scale to a block of weights; with double quantisation
# one byte to a block, and a float32 scale to a block of these. Block sizes of bitsandbytes.
BLOCK, BLOCK_OF_SCALES = 64, 256


def shape_of_run(config: Any, model_config: Any) -> MemoryShape:
    """A model's sizes, with what flags change in them: adapters, and the kernels of `--liger`.

    config: a `TrainConfig`, or a plan's arguments.
    """
    shape = MemoryShape.from_config(model_config)
    return replace(shape, adapters=adapters_of_run(config, shape), fused=config.liger)


def adapters_of_run(config: Any, shape: MemoryShape) -> Adapters | None:
    """Of the flags; None for full fine-tuning. ValueError for targets that a layer of this model has not.

    An adapter that is trained on may be one of experts, whose matrices are no linear modules.
    """
    if not config.lora_r:
        return None
    targets = tuple(config.lora_targets or shape.matrix_names)
    of_experts = MLP if shape.is_mixture and is_adapter(config.model) else ()
    if unknown := sorted(set(targets) - {*shape.matrix_names, *of_experts}):
        raise ValueError(
            f"--lora-targets {' '.join(unknown)} cannot be planned for: a layer of this model has the matrices "
            f"{', '.join(shape.matrix_names)}; name some of these (the train loop takes others with --memory off)"
        )
    if shape.is_mixture and len(halves := [name for name in targets if name in INTO_MLP]) == 1:
        raise ValueError(
            f"--lora-targets has {halves[0]}, one of the two that experts hold as one: name gate_proj and up_proj, or "
            "neither"
        )
    trained = config.lora_train or ()
    return Adapters(
        config.lora_r, targets, "embeddings" in trained, "norms" in trained, config.quantize, config.double_quant
    )


def bytes_of_nf4(double_quant: bool) -> float:
    """Of one weight, its share of the scales included."""
    scales = (1 + 4 / BLOCK_OF_SCALES) / BLOCK if double_quant else 4 / BLOCK
    return 0.5 + scales


def _bytes_of_quantized(shape: MemoryShape) -> float:
    return 0.0 if shape.adapters is None else bytes_of_nf4(shape.adapters.double_quant)


def adapter_parameters(shape: MemoryShape) -> int:
    """Of a layer: two narrow matrices beside each target, and beside each expert's."""
    return beside_matrices(shape) + _beside_experts(shape)


def beside_matrices(shape: MemoryShape) -> int:
    """Of a layer's adapters, those that tokens go through; those of experts are added to the experts."""
    return sum(_beside(shape, matrix) for matrix in shape.targets)


def _beside(shape: MemoryShape, matrix: Matrix) -> int:
    return 0 if shape.adapters is None else shape.adapters.rank * (matrix.inputs + matrix.outputs)


def _beside_experts(shape: MemoryShape) -> int:
    """Of all experts: gate and up are one matrix to peft, with twice the rank."""
    if shape.adapters is None or not shape.trains_experts:
        return 0
    into, out = _adapted_of_experts(shape)
    d, f = shape.hidden, shape.intermediate
    return shape.adapters.rank * shape.experts * (into * 2 * (d + 2 * f) + out * (f + d))


def _adapted_of_experts(shape: MemoryShape) -> tuple[bool, bool]:
    """Whether adapters are added to the experts' matrices into the MLP's width, and to those out of it."""
    names = shape.adapters.targets if shape.adapters is not None and shape.is_mixture else ()
    return any(name in INTO_MLP for name in names), any(name in OUT_OF_MLP for name in names)


def adapted_experts(shape: MemoryShape) -> tuple[int, int]:
    """Weights of a layer's experts, into the MLP's width and out of it, that adapters are added to: peft makes these
    anew, whole, in every forward."""
    into, out = _adapted_of_experts(shape)
    each = shape.experts * shape.hidden * shape.intermediate
    return 2 * each * into, each * out


def trained_in_mlp(shape: MemoryShape) -> int:
    """Of a layer's MLP, where it is not a mixture's."""
    of_mlp = shape.trained_among(MLP)
    return sum(m.parameters if shape.adapters is None else _beside(shape, m) for m in of_mlp)


def trained_parameters(shape: MemoryShape) -> int:
    """Those with a gradient and optimizer state."""
    of = shape.adapters
    if of is None:
        return shape.parameters
    return sum(trained_by_layer(shape)) + of.norms * shape.hidden + of.embeddings * shape.vocab * shape.hidden


def trained_by_layer(shape: MemoryShape) -> list[int]:
    """The same of each layer."""
    each = [_trained_in(kind) for kind in shape.kinds]
    return [each[shape.kind(index)] for index in range(shape.num_layers)]


def trained_in_layer(shape: MemoryShape) -> int:
    """Of the largest layer."""
    return max(_trained_in(kind) for kind in shape.kinds)


def _trained_in(kind: MemoryShape) -> int:
    of = kind.adapters
    return kind.largest_layer if of is None else adapter_parameters(kind) + of.norms * _norms_of_layer(kind)


def _norms_of_layer(shape: MemoryShape) -> int:
    return shape.norms * shape.hidden + (2 * shape.head_dim if shape.head_norms else 0)


def quantized_parameters(shape: MemoryShape) -> int:
    """Those held in 4 bits: the matrices of all layers."""
    is_quantized = shape.adapters is not None and shape.adapters.quantize is not None
    return is_quantized * shape.matrix_parameters


def frozen_bytes(shape: MemoryShape, each: int) -> int:
    """Of the model without its adapters, `each` for a weight that is not quantised."""
    few = quantized_parameters(shape)
    return int(few * _bytes_of_quantized(shape)) + (shape.parameters - few) * each


def largest_layer_bytes(shape: MemoryShape, each: int) -> int:
    """Of a layer with its adapters, `each` for a weight that is not quantised."""
    return max(_layer_bytes(kind, each) for kind in shape.kinds)


def _layer_bytes(kind: MemoryShape, each: int) -> int:
    few = quantized_parameters(kind) // kind.num_layers
    return int(few * _bytes_of_quantized(kind)) + (kind.largest_layer - few + adapter_parameters(kind)) * each


def largest_matrix(shape: MemoryShape) -> int:
    """Weights that are made whole again at a time, in the compute dtype, where they are held in 4 bits."""
    if not quantized_parameters(shape):
        return 0
    return max(m.parameters for m in shape.matrices)
