"""FLOPs of a model's matrices, a token or a step of the optimizer."""

from easyctx.memory.adapters import adapted_experts, beside_matrices
from easyctx.memory.shape import MemoryShape

MUON_ROUNDS = 5  # of torch.optim.Muon's orthogonalisation


def layer_matrices(model: MemoryShape) -> tuple[int, int]:
    """Parameters of a layer's matrices that one token goes through, and those of them in the last one."""
    attention = (2 * model.q_width + model.kv_width) * model.hidden
    router = model.experts * model.hidden if model.is_mixture else 0
    down = model.active_experts * model.intermediate * model.hidden
    return attention + router + 3 * down, down


def flops_a_token(model: MemoryShape) -> int:
    """Of all matrices, forward and backward, nothing twice."""
    head = (6 if model.trains_head else 4) * model.vocab * model.hidden
    return head + sum(_flops_of_layer(model.of_layer(index)) for index in range(model.num_layers))


def _flops_of_layer(kind: MemoryShape) -> int:
    layer, _ = layer_matrices(kind)
    if kind.adapters is None:
        return 6 * layer
    # Experts that adapters are added to have a gradient, as those that are trained.
    of_experts = kind.active_experts * sum(adapted_experts(kind)) // kind.experts
    return 4 * layer + 6 * beside_matrices(kind) + 2 * of_experts


def muon_flops(model: MemoryShape) -> float:
    """Of Muon's step: in each round of each matrix its Gram matrix, that one's square, and both times the matrix."""
    total = 0.0
    for matrix in model.matrices:
        short, long = sorted((matrix.inputs, matrix.outputs))
        total += matrix.layers * MUON_ROUNDS * (4.0 * short**2 * long + 2.0 * short**3)
    return total
