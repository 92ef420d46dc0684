"""What a run gives the budget beside its model, and what of weights, gradients and optimizer a rank then holds."""

from dataclasses import dataclass, field

from easyctx.memory.adapters import frozen_bytes, trained_parameters
from easyctx.memory.engines import get_engine, optimizer_bytes
from easyctx.memory.shape import MemoryShape
from easyctx.memory.working_set import Widths

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What is given: length, spread, engine.

    tokens: of one rank in one micro-batch: sequences x ceil(length / SP degree).
    ranks: over which a sharding engine shards; local_ranks: those that share one machine's host memory.
    ring, ulysses: ranks of the two axes that attention runs over.
    weight_bytes: of a parameter in training where the engine has no half-precision copy (4: float32 masters); beside
        adapters, of a frozen one.
    optimizer: one of `engines.OPTIMIZERS`.
    fused_loss: as on a GPU, where a tile's gradient takes the place of its logits (`easyctx.tiled_loss`).
    pins: whether an engine that pins what it offloads (`engines.Engine.pins`) does so.
    """

    tokens: int
    engine: str = "fsdp2"
    ranks: int = 1
    local_ranks: int = 1
    ring: int = 1
    ulysses: int = 1
    kernel: str = "flash4"
    widths: Widths = field(default_factory=Widths)
    weight_bytes: int = 4
    optimizer: str = "adamw"
    accumulates: bool = False
    tiled_loss: bool = True
    fused_loss: bool = True
    pins: bool = True
    process: int = 4 * GIB  # host memory of a Python process with torch, CUDA and NCCL

    def trained_bytes(self, shape: MemoryShape) -> int:
        """Of a trained parameter where the engine has no half-precision copy: beside frozen ones they are exact."""
        return self.weight_bytes if shape.adapters is None else max(self.weight_bytes, 4)


def states(shape: MemoryShape, setting: Setting) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state of one rank."""
    engine, trained = get_engine(setting.engine), trained_parameters(shape)
    share = 1 / (setting.ranks if engine.sharded else 1)
    if shape.adapters is not None:
        # Beside frozen weights in half precision, what is trained is there exactly.
        weights = frozen_bytes(shape, setting.weight_bytes) + setting.trained_bytes(shape) * trained
    else:
        weights = int((setting.weight_bytes if engine.weights == 4 else engine.weights) * shape.parameters)
    scale = setting.trained_bytes(shape) / 4 if engine.weights == 4 else 1.0
    gradients = engine.gradients * scale * trained
    optimizer = optimizer_bytes(engine, setting.optimizer, trained, shape.matrix_parameters) * scale
    return int(share * weights), int(share * gradients), int(share * optimizer)
