"""Seconds of one training step: matrices, attention, what lies between them, and what the engine moves.

Every part is counted, not fitted, but for one number: the share of the dense rate that a model's matrices reach
(`GEMM_IN_MODEL`). What overlaps is the larger of the two; parts that follow each other are added up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from easyctx.cost.attention import AttentionCost, attention_cost
from easyctx.cost.flops import MUON_ROUNDS, flops_a_token, layer_matrices, muon_flops
from easyctx.cost.hardware import Cluster
from easyctx.cost.stages import Passes, Shape, causal_pairs
from easyctx.memory.adapters import (
    adapted_experts,
    beside_matrices,
    bytes_of_nf4,
    frozen_bytes,
    quantized_parameters,
    trained_parameters,
)
from easyctx.memory.budget import Choices, MemoryShape, Widths
from easyctx.memory.engines import get_engine, optimizer_bytes
from easyctx.memory.matrices import MLP
from easyctx.memory.working_set import kept_of

# Of the rate of large square products. Fitted to the two steps that benchmarks/cost_parts/reference_steps.json marks
# so; the others there test it.
GEMM_IN_MODEL = 0.80
# Passes over memory in bytes an element, as stock transformers modules run them in bfloat16, forward; the backward
# moves twice as much.
NORM, ROPE, RESIDUAL, SWIGLU, CROSS_ENTROPY = 36, 20, 6, 10, 30
# The same of Liger's kernels: each tensor is read once and written once, RoPE's in place.
NORM_OF_LIGER, ROPE_OF_LIGER, SWIGLU_OF_LIGER = 4, 4, 6
# The same of a LoRA layer: its input is read, its result added in place (`easyctx.adapters.fused`). Under engines that
# share weights out, peft's own writes the result, scales it, and adds it to the frozen matrix's.
LORA_IN, LORA_OUT, LORA_OUT_OF_PEFT = 2, 4, 12
ADAM_BYTES = 40  # a parameter: float32 weights and moments read and written, gradients read; the norm and its clipping
# The same of Muon's passes (torch.optim.Muon): norm and clipping, momentum, update, its norm, weights; and in each
# round the bfloat16 update read three times and written once.
MUON_BYTES = 12 + 12 + 12 + 12 + 18 + 8 * MUON_ROUNDS


@dataclass(frozen=True)
class Step:
    """What is trained how: one optimizer step.

    cluster: the GPUs that share a sequence. world: all GPUs; `world / cluster.gpus` sequences of `batch` rows run side
    by side, `accumulate` times in a step.
    windows: layers by their window.
    choices: what each layer keeps and where.
    """

    model: MemoryShape
    seq_length: int
    cluster: Cluster
    mode: str
    choices: Choices
    engine: str = "fsdp2"
    ring_degree: int | None = None
    world: int | None = None
    batch: int = 1
    accumulate: int = 1
    windows: Mapping[int | None, int] = field(default_factory=dict)
    kernel: str = "auto"
    passes: Passes | None = None
    widths: Widths = field(default_factory=Widths)
    optimizer: str = "adamw"

    @property
    def is_shared(self) -> bool:
        return self.mode != "data_parallel"

    @property
    def local_tokens(self) -> int:
        """Tokens of one GPU and micro-batch."""
        return self.batch * -(-self.seq_length // (self.cluster.gpus if self.is_shared else 1))

    @property
    def all_gpus(self) -> int:
        return self.world or self.cluster.gpus

    @property
    def tokens(self) -> int:
        """Tokens of the whole step."""
        groups = self.all_gpus // (self.cluster.gpus if self.is_shared else 1)
        return groups * self.batch * self.seq_length * self.accumulate


@dataclass(frozen=True)
class StepCost:
    """Seconds by part; what is hidden behind other work is not counted. mfu: model FLOPs, causal and without what is
    recomputed, over the datasheet's rate."""

    parts: Mapping[str, float]
    tokens: int
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def step_cost(step: Step) -> StepCost:
    """Raises ValueError for a mode, heads, degrees or an engine that cannot be."""
    forward, backward = attention_of(step, backward=False), attention_of(step, backward=True)
    again = sum(
        count
        for count, layer in zip(reruns(step.choices), step.choices.layers, strict=True)
        if layer.attention == "recompute"
    )
    recomputed = forward.times(again / step.model.num_layers)
    device = step.cluster.device
    matrices = matrix_flops(step) / (device.gemm_flops * GEMM_IN_MODEL)
    between = between_bytes(step) / device.streaming_rate
    micro = {
        "attention": forward.seconds + backward.seconds,
        "attention again": recomputed.seconds,
        "matrices": matrices,
        "norms, RoPE, MLP activation, loss": between,
    }
    parts = {name: seconds * step.accumulate for name, seconds in micro.items()}
    hidden = sum(parts.values())
    parts["waiting for the host"] = max(0.0, host_seconds(step) - hidden)
    parts["waiting for weights and gradients"] = max(0.0, engine_seconds(step) - hidden)
    parts["optimizer"] = optimizer_seconds(step)
    seconds = sum(parts.values())
    return StepCost(parts, step.tokens, model_flops(step) / step.all_gpus / seconds / device.dense_flops)


def attention_of(step: Step, *, backward: bool) -> AttentionCost:
    """One direction through all layers, of one micro-batch."""
    model, windows = step.model, step.windows or {None: step.model.num_layers}
    total = AttentionCost(0, 0, 0, 0, 0, 0)
    for window, layers in windows.items():
        tokens = step.local_tokens // step.batch
        shape = Shape(tokens, model.q_heads, model.kv_heads, model.head_dim, window, step.batch)
        cost = attention_cost(
            step.mode,
            shape,
            step.cluster,
            backward=backward,
            ring_degree=step.ring_degree,
            kernel=step.kernel,
            passes=step.passes,
        )
        total = total + cost.times(layers)
    return total


def matrix_flops(step: Step) -> float:
    """Of a GPU's matrices in one micro-batch: forward, twice that backward, and what is recomputed.

    The backward of a frozen matrix is its forward's size: it has no gradient of its own, its adapter has. PyTorch ends
    a layer's recompute once the inputs of its last matrix are there, so that this one runs once.
    """
    again = 0
    for index, (count, choice) in enumerate(zip(reruns(step.choices), step.choices.layers, strict=True)):
        kind = step.model.of_layer(index)
        layer, last = layer_matrices(kind)
        again += 2 * ((layer + beside_matrices(kind)) * count - last * (not choice.everything))
    return (flops_a_token(step.model) + again) * float(step.local_tokens)


def reruns(choices: Choices) -> list[int]:
    """How often each layer's forward runs again: for its backward, and for the input of a layer that kept none."""
    following = [*choices.layers[1:], None]
    return [
        (not layer.everything) + (after is not None and after.inputs == "recompute" and not after.everything)
        for layer, after in zip(choices.layers, following, strict=True)
    ]


def between_bytes(step: Step) -> float:
    """Of memory traffic outside matrices and attention, of a GPU in one micro-batch."""
    of_kind = [_bytes_of_layer(kind, step) for kind in step.model.kinds]
    layers = sum((3 + count) * of_kind[step.model.kind(i)] for i, count in enumerate(reruns(step.choices)))
    return layers + float(CROSS_ENTROPY * step.model.vocab * step.local_tokens)


def _bytes_of_layer(kind: MemoryShape, step: Step) -> float:
    """The same of a layer's forward."""
    norm, rope = (NORM_OF_LIGER, ROPE_OF_LIGER) if kind.fused else (NORM, ROPE)
    swiglu = SWIGLU_OF_LIGER if kind.fused_mlp else SWIGLU
    rotated = kind.q_width + kind.kv_width // 2
    layer = (norm * kind.norms + RESIDUAL * 2) * kind.hidden * step.widths.stream / 2 + rope * rotated
    layer += swiglu * kind.active_experts * kind.intermediate + (norm * rotated if kind.head_norms else 0)
    of_result = LORA_OUT_OF_PEFT if get_engine(step.engine).sharded else LORA_OUT
    layer += sum(LORA_IN * m.inputs + of_result * m.outputs for m in kind.targets)
    merged = 2 * step.widths.compute * sum(adapted_experts(kind))  # experts read, and written with their adapters added
    return layer * step.local_tokens + _out_of_4_bits(kind, step) + merged


def _out_of_4_bits(kind: MemoryShape, step: Step) -> float:
    """Of a layer's quantised weights, once in the compute dtype: for every tile of the MLP anew."""
    if not quantized_parameters(kind):
        return 0.0
    tiles = -(-step.local_tokens // step.choices.mlp_tile) if step.choices.mlp_tile else 1
    weights = sum(m.parameters * (tiles if m.name in MLP else 1) for m in kind.matrices)
    return weights * (step.widths.compute + bytes_of_nf4(kind.adapters is not None and kind.adapters.double_quant))


def model_flops(step: Step) -> float:
    """Of the whole step: 6 a matrix parameter and token (4 a frozen one), 12 a visible query-key pair, head and unit of
    head dim."""
    model = step.model
    linear = float(flops_a_token(model)) * step.tokens
    windows = step.windows or {None: model.num_layers}
    pairs = sum(layers * causal_pairs(step.seq_length, window) for window, layers in windows.items())
    return linear + 12.0 * model.q_width * pairs * (step.tokens / step.seq_length)


def host_seconds(step: Step) -> float:
    """Copies to pinned memory and back of what layers keep there, and of weights that live there."""
    device, engine = step.cluster.device, get_engine(step.engine)
    kept = sum(
        kept_of(layer, step.model.of_layer(index), step.widths, step.choices)["host"]
        for index, layer in enumerate(step.choices.layers)
    )
    moved = 2.0 * kept * step.local_tokens * step.accumulate
    if engine.offloads:
        moved += _own_parameters(step) * step.widths.compute * _gathers(step)
    return moved / min(device.host_rate, device.host_memory_rate / step.cluster.gpus_per_node)


def _own_parameters(step: Step) -> float:
    """Parameters whose optimizer state one GPU has."""
    return step.model.parameters / (step.all_gpus if get_engine(step.engine).sharded else 1)


def _gathers(step: Step) -> int:
    """How often weights are put together: forward and backward of each micro-batch."""
    return 2 * step.accumulate


def engine_seconds(step: Step) -> float:
    """Weights gathered and gradients reduced, as rings that use all of a node's adapters at once."""
    engine, cluster, gpus = get_engine(step.engine), step.cluster, step.all_gpus
    if gpus == 1:
        return 0.0
    nodes = max(cluster.nodes * gpus // cluster.gpus, 1)
    rate = cluster.device.nvlink_rate
    if nodes > 1:
        rate = min(rate, cluster.device.network_rate * gpus / nodes)
    elsewhere = (gpus - 1) / gpus
    trained = trained_parameters(step.model) * elsewhere
    if not engine.sharded:
        return 2 * trained * engine.weights / rate
    gathered = frozen_bytes(step.model, step.widths.compute) * elsewhere * _gathers(step)
    return (gathered + trained * step.widths.compute * step.accumulate) / rate


def optimizer_seconds(step: Step) -> float:
    """At the rate of the GPU's memory; offloaded, of the host's, with gradients sent there and weights back."""
    engine, device = get_engine(step.engine), step.cluster.device
    if step.optimizer == "muon":
        return _muon_seconds(step)
    own = _own_parameters(step) * trained_parameters(step.model) / step.model.parameters
    if not engine.offloads:
        saved = 2 * (engine.optimizer - optimizer_bytes(engine, step.optimizer, 1, 0))
        return own * (ADAM_BYTES - saved) / device.streaming_rate
    on_host = own * step.cluster.gpus_per_node * ADAM_BYTES / device.host_memory_rate
    return on_host + own * (engine.gradients + step.widths.compute) / device.host_rate


def _muon_seconds(step: Step) -> float:
    """Muon for the layers' matrices, which every GPU steps whole, and AdamW for the rest."""
    model, device = step.model, step.cluster.device
    moved = model.matrix_parameters * MUON_BYTES + (model.parameters - model.matrix_parameters) * ADAM_BYTES
    return muon_flops(model) / (device.gemm_flops * GEMM_IN_MODEL) + moved / device.streaming_rate
