"""What LoRA changes in the count of a model: weights that are frozen, or of 4 bits, and adapters beside them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyctx.memory.shape import Matrix, MemoryShape

# Names of a layer's linear modules: those that work on a norm's result, and those behind them.
INTO_ATTENTION, INTO_MLP = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")
OUT_OF_ATTENTION, OUT_OF_MLP = ("o_proj",), ("down_proj",)
ATTENTION, MLP = INTO_ATTENTION + OUT_OF_ATTENTION, INTO_MLP + OUT_OF_MLP

# NF4 (arXiv 2305.14314): half a byte a weight and a float32 scale to a block of weights; with double quantisation
# one byte to a block, and a float32 scale to a block of these. Block sizes of bitsandbytes.
BLOCK, BLOCK_OF_SCALES = 64, 256


@dataclass(frozen=True)
class Adapters:
    """LoRA (arXiv 2106.09685) over frozen weights.

    rank: of each adapter. targets: the matrices of a layer that have one, by their module's name.
    embeddings, norms: whether these are trained, too (arXiv 2309.12307).
    quantize: "nf4" where a layer's matrices are held in 4 bits; double_quant: their scales in 8 bits.
    """

    rank: int
    targets: tuple[str, ...]
    embeddings: bool = False
    norms: bool = False
    quantize: str | None = None
    double_quant: bool = True

    @classmethod
    def from_train_config(cls, config: Any, shape: "MemoryShape") -> "Adapters | None":
        """Of a run's flags; None for full fine-tuning."""
        if not config.lora_r:
            return None
        targets = tuple(config.lora_targets or shape.matrix_names)
        if unknown := sorted(set(targets) - set(shape.matrix_names)):
            raise ValueError(
                f"--lora-targets {' '.join(unknown)} cannot be planned for: a layer of this model has the matrices "
                f"{', '.join(shape.matrix_names)}; name some of these (the train loop takes others with --memory off)"
            )
        trained = config.lora_train or ()
        return cls(
            config.lora_r, targets, "embeddings" in trained, "norms" in trained, config.quantize, config.double_quant
        )


def bytes_of_nf4(double_quant: bool) -> float:
    """Of one weight, its share of the scales included."""
    scales = (1 + 4 / BLOCK_OF_SCALES) / BLOCK if double_quant else 4 / BLOCK
    return 0.5 + scales


def _bytes_of_quantized(shape: "MemoryShape") -> float:
    return 0.0 if shape.adapters is None else bytes_of_nf4(shape.adapters.double_quant)


def adapter_parameters(shape: "MemoryShape") -> int:
    """Of a layer: two narrow matrices beside each target."""
    return sum(_beside(shape, matrix) for matrix in shape.targets)


def _beside(shape: "MemoryShape", matrix: "Matrix") -> int:
    return 0 if shape.adapters is None else shape.adapters.rank * (matrix.inputs + matrix.outputs)


def trained_in_mlp(shape: "MemoryShape") -> int:
    """Of a layer's MLP, where it is not a mixture's."""
    of_mlp = shape.trained_among(MLP)
    return sum(m.inputs * m.outputs if shape.adapters is None else _beside(shape, m) for m in of_mlp)


def trained_parameters(shape: "MemoryShape") -> int:
    """Those with a gradient and optimizer state."""
    of = shape.adapters
    if of is None:
        return shape.parameters
    beside = sum(_beside(shape, matrix) * matrix.layers for matrix in shape.targets)
    norms = of.norms * (shape.num_layers * _norms_of_layer(shape) + shape.hidden)
    return beside + norms + of.embeddings * shape.vocab * shape.hidden


def trained_in_layer(shape: "MemoryShape") -> int:
    """Of the largest layer."""
    of = shape.adapters
    return shape.largest_layer if of is None else adapter_parameters(shape) + of.norms * _norms_of_layer(shape)


def _norms_of_layer(shape: "MemoryShape") -> int:
    return shape.norms * shape.hidden + (2 * shape.head_dim if shape.head_norms else 0)


def quantized_parameters(shape: "MemoryShape") -> int:
    """Those held in 4 bits: the matrices of all layers."""
    is_quantized = shape.adapters is not None and shape.adapters.quantize is not None
    return is_quantized * sum(m.inputs * m.outputs * m.layers for m in shape.matrices)


def frozen_bytes(shape: "MemoryShape", each: int) -> int:
    """Of the model without its adapters, `each` for a weight that is not quantised."""
    few = quantized_parameters(shape)
    return int(few * _bytes_of_quantized(shape)) + (shape.parameters - few) * each


def largest_layer_bytes(shape: "MemoryShape", each: int) -> int:
    """Of a layer with its adapters, `each` for a weight that is not quantised."""
    few = quantized_parameters(shape) // shape.num_layers
    return int(few * _bytes_of_quantized(shape)) + (shape.largest_layer - few + adapter_parameters(shape)) * each


def largest_matrix(shape: "MemoryShape") -> int:
    """Weights that are made whole again at a time, in the compute dtype, where they are held in 4 bits."""
    if not quantized_parameters(shape):
        return 0
    return max(m.inputs * m.outputs for m in shape.matrices)
