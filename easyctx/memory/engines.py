"""Where each engine holds weights, gradients and optimizer state, in bytes a parameter."""

from dataclasses import dataclass

_MOMENTS = 8  # Adam's two, in float32, which `Engine.optimizer` counts
_MOMENTS_8BIT = 2 * (1 + 4 / 256)  # bitsandbytes: a byte each, and a float32 scale to a block of 256


def is_paged(optimizer: str) -> bool:
    """Whether its state is in memory that the GPU and the host share, and goes to the host where the GPU is full."""
    return optimizer.startswith("paged_")


def optimizer_bytes(engine: "Engine", optimizer: str, trained: int, in_matrices: int) -> float:
    """Of all `trained` parameters, `in_matrices` of them in matrices of the layers, which alone Muon steps.

    Optimizers that are not known here are taken for AdamW in float32.
    """
    if optimizer == "muon":
        return engine.optimizer * trained - _MOMENTS / 2 * in_matrices  # one momentum in place of two moments
    return trained * (engine.optimizer - (_MOMENTS - _MOMENTS_8BIT) * optimizer.endswith("adamw_8bit"))


def muon_step_bytes(inputs: int, outputs: int, each: int) -> int:
    """What Muon's step of one matrix of `each` bytes a parameter takes: the update, and its orthogonalisation in
    bfloat16 (torch.optim.Muon), which has the matrix before and after, its Gram matrix and a polynomial of that."""
    square = min(inputs, outputs) ** 2
    return inputs * outputs * (each + 2 * 2) + square * 2 * 2


@dataclass(frozen=True)
class Engine:
    """Bytes a parameter of AdamW training.

    weights, optimizer: resident the whole step (optimizer with the master copy, where weights are half precision).
    gradients: from a layer's backward to the end of the step.
    sharded: whether these are shared out over all ranks; where not, each rank has all.
    offloads: the resident ones are in host memory.
    gathers: weights are put together layer by layer.
    pins: those in host memory, and their gradients, are pinned tensor by tensor, unless a run does without.
    own_pool: gradients are made on a stream of their own, and PyTorch gives a stream's memory to no other one: what
        they take once is set aside for them from then on.
    """

    weights: int
    gradients: int
    optimizer: int
    sharded: bool
    offloads: bool = False
    gathers: bool = False
    pins: bool = False
    own_pool: bool = False


# float32 weights, their gradients and Adam's two moments; half-precision ones with float32 masters under DeepSpeed
# (whose own estimate is 18 bytes a parameter: deepspeed.runtime.zero.stage3, estimate_zero3_model_states_mem_needs).
ENGINES: dict[str, Engine] = {
    "one process": Engine(4, 4, 8, sharded=False),
    "ddp": Engine(4, 8, 8, sharded=False),  # gradients and the buckets they are sent in
    "fsdp2": Engine(4, 4, 8, sharded=True, gathers=True, own_pool=True),
    "fsdp2_offload": Engine(4, 4, 8, sharded=True, offloads=True, gathers=True, pins=True),
    "zero3": Engine(2, 4, 12, sharded=True, gathers=True),
    "zero3_offload": Engine(2, 4, 12, sharded=True, offloads=True, gathers=True),
}


def get_engine(name: str) -> Engine:
    """ValueError, with the names, for an engine that is not there."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")
    return ENGINES[name]
