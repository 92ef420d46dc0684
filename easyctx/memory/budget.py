"""The memory of a training step, in bytes: a model's shape, a setting and choices in, a breakdown out.

    shape = MemoryShape.from_config(AutoConfig.from_pretrained("meta-llama/Meta-Llama-3-8B"))
    setting = Setting(tokens=262_144 // 2, engine="fsdp2", ranks=2, ring=2)
    predict(shape, setting, Choices.alike(shape.num_layers)).gpu_peak

Pure: no GPU, no processes, no model. A step has a peak in each of a few moments (the forward of the last layer, the
loss, each layer's backward, the optimizer); the largest is the step's. Every term of it has a name.
"""

from dataclasses import dataclass, field

from easyctx.memory.choices import Choices, LayerChoice, Place
from easyctx.memory.engines import ENGINES, get_engine
from easyctx.memory.shape import MemoryShape
from easyctx.memory.working_set import (
    Widths,
    backward_of_attention,
    backward_of_mlp,
    forward_of_layer,
    kept_attention,
    kept_inputs,
    kept_of,
    mlp_inside,
    norm_kept,
)

__all__ = ["ENGINES", "Breakdown", "Choices", "LayerChoice", "MemoryShape", "Place", "Setting", "Widths", "predict"]

GIB = 2**30
LOSS_TILE = 1 << 26  # logits at a time: `easyctx.head.TILE_ELEMENTS`
PROCESS_ON_HOST = 4 * GIB  # of a Python process with torch, CUDA and NCCL
_ZERO3_LIVE = 1_000_000_000  # parameters that DeepSpeed keeps gathered, at most (stage3_max_live_parameters)


@dataclass(frozen=True)
class Setting:
    """What is given: length, spread, engine.

    tokens: of one rank in one micro-batch: sequences x ceil(length / SP degree).
    ranks: over which a sharding engine shards; local_ranks: those that share one machine's host memory.
    ring, ulysses: ranks of the two axes that attention runs over.
    weight_bytes: of a parameter in training where the engine has no half-precision copy (4: float32 masters).
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
    accumulates: bool = False
    tiled_loss: bool = True


@dataclass(frozen=True)
class Breakdown:
    """Predicted bytes. `gpu`: the terms that are there at the worst moment, of one rank; `host`: of one machine.

    moments: the total of each moment on the GPU.
    """

    gpu: dict[str, int]
    host: dict[str, int]
    moment: str
    moments: dict[str, int] = field(default_factory=dict)

    @property
    def gpu_peak(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_peak(self) -> int:
        return sum(self.host.values())


def predict(shape: MemoryShape, setting: Setting, choices: Choices) -> Breakdown:
    """The step's peak on a GPU and on a machine's host memory."""
    if len(choices.layers) != shape.num_layers:
        raise ValueError(f"choices for {len(choices.layers)} layers were given, and the model has {shape.num_layers}")
    moments = {
        "forward of the last layer": _forward(shape, setting, choices),
        "loss": _loss(shape, setting, choices),
        **_backwards(shape, setting, choices),
        "optimizer": _optimizer(shape, setting),
    }
    totals = {name: sum(terms.values()) for name, terms in moments.items()}
    worst = max(totals, key=lambda name: totals[name])
    gpu = {name: size for name, size in moments[worst].items() if size}
    return Breakdown(gpu, _host(shape, setting, choices), worst, totals)


def states(shape: MemoryShape, setting: Setting) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state of one rank."""
    engine = get_engine(setting.engine)
    share = shape.parameters // setting.ranks if engine.sharded else shape.parameters
    factor = 1.0 if engine.weights == 2 else setting.weight_bytes / 4
    return tuple(int(share * factor * each) for each in (engine.weights, engine.gradients, engine.optimizer))  # type: ignore[return-value]


def kept(shape: MemoryShape, setting: Setting, choices: Choices, layers: int) -> dict[str, int]:
    """What the first `layers` layers leave for the backward, of one rank, by place."""
    parts = [kept_of(layer, shape, setting.widths, choices) for layer in choices.layers[:layers]]
    return {place: setting.tokens * sum(part[place] for part in parts) for place in ("gpu", "host")}


def _resident(shape: MemoryShape, setting: Setting) -> dict[str, int]:
    """On the GPU throughout: weights and optimizer state."""
    weights, _, optimizer = states(shape, setting)
    on_gpu = not get_engine(setting.engine).offloads
    return {"weights": on_gpu * weights, "optimizer state": on_gpu * optimizer}


def _gathered(shape: MemoryShape, setting: Setting, backward: bool) -> int:
    """Whole weights in the compute dtype: of this layer and the next, and of embedding and head."""
    compute, engine = setting.widths.compute, get_engine(setting.engine)
    if not engine.gathers:
        # Autocast keeps a copy of all weights for the length of the forward, and of one layer's in the backward.
        casts = setting.weight_bytes > compute
        return casts * compute * (shape.largest_layer if backward else shape.parameters)
    if setting.engine.startswith("zero3"):
        return compute * min(_ZERO3_LIVE, shape.parameters)
    return compute * (2 * shape.largest_layer + shape.outer_parameters)


def _gradients(shape: MemoryShape, setting: Setting, choices: Choices, done: int) -> dict[str, int]:
    """Gradients after the backward of head and `done` layers, and those of the layer that is being done."""
    engine, (_, whole, _) = get_engine(setting.engine), states(shape, setting)
    finished = shape.outer_parameters + done * (shape.layer_parameters // shape.num_layers)
    share = whole if setting.accumulates else whole * finished // shape.parameters
    # As the backward makes them, and as they are sent.
    fresh = setting.widths.compute * shape.largest_layer * (2 if engine.gathers else 1)
    if choices.mlp_tile:
        fresh += setting.widths.exact * shape.largest_layer  # sums over tiles
    return {"gradients": 0 if engine.offloads else share, "gradients of a layer": fresh}


def _forward(shape: MemoryShape, setting: Setting, choices: Choices) -> dict[str, int]:
    return {
        **_resident(shape, setting),
        "gradients": setting.accumulates * (not get_engine(setting.engine).offloads) * states(shape, setting)[1],
        "gathered weights": _gathered(shape, setting, backward=False),
        "kept for the backward": kept(shape, setting, choices, shape.num_layers)["gpu"],
        "on the way to the host": setting.tokens * _host_bytes(choices.layers[-1], shape, setting, choices),
        "forward of a layer": setting.tokens * forward_of_layer(shape, setting.widths, choices, setting.ring),
    }


def _loss(shape: MemoryShape, setting: Setting, choices: Choices) -> dict[str, int]:
    d, v, widths, tokens = shape.hidden, shape.vocab, setting.widths, setting.tokens
    hidden = tokens * (widths.stream * d + norm_kept(d, widths, choices.tiled_norms) + widths.compute * d)
    if setting.tiled_loss:
        tile = min(LOSS_TILE, tokens * v)
        loss = tile * (2 * widths.exact + 2 * widths.compute) + tokens * widths.compute * d
        loss += v * d * (widths.exact + widths.compute)  # the head's gradient, and a tile's share of it
    else:
        loss = tokens * v * (2 * widths.exact + widths.compute)
    return {
        **_resident(shape, setting),
        "gradients": setting.accumulates * (not get_engine(setting.engine).offloads) * states(shape, setting)[1],
        "gathered weights": _gathered(shape, setting, backward=False),
        "kept for the backward": kept(shape, setting, choices, shape.num_layers)["gpu"],
        "last hidden states": hidden,
        "loss": loss,
    }


def _backwards(shape: MemoryShape, setting: Setting, choices: Choices) -> dict[str, dict[str, int]]:
    """The backward of each layer: what earlier layers keep falls, what gradients take grows."""
    found = {}
    for index in reversed(range(shape.num_layers)):
        layer, done = choices.layers[index], shape.num_layers - 1 - index
        found[f"backward of layer {index}"] = {
            **_resident(shape, setting),
            **_gradients(shape, setting, choices, done),
            "gathered weights": _gathered(shape, setting, backward=True),
            "kept for the backward": kept(shape, setting, choices, index + 1)["gpu"],
            "back from the host": _fetched(index, shape, setting, choices),
            "inputs made again": setting.tokens * _stashed(index, choices) * kept_inputs(shape, setting.widths),
            "backward of a layer": _working_set(layer, shape, setting, choices),
        }
    return found


def _working_set(layer: LayerChoice, shape: MemoryShape, setting: Setting, choices: Choices) -> int:
    """The larger of attention's backward and the MLP's, for all tokens, and for one tile of the MLP."""
    widths, spread = setting.widths, (setting.kernel, setting.ring, setting.ulysses)
    of_attention = backward_of_attention(shape, widths, choices, *spread)
    of_mlp = backward_of_mlp(shape, widths, choices)
    again = kept_attention(shape, widths) if layer.attention == "recompute" else 0
    tile = min(choices.mlp_tile, setting.tokens) * mlp_inside(shape, widths)
    return max(setting.tokens * (of_attention + again), setting.tokens * (of_mlp + again) + tile)


def _host_bytes(layer: LayerChoice, shape: MemoryShape, setting: Setting, choices: Choices) -> int:
    return kept_of(layer, shape, setting.widths, choices)["host"]


def _fetched(index: int, shape: MemoryShape, setting: Setting, choices: Choices) -> int:
    """Of this layer, and of the one before it, whose backward comes next."""
    layers = choices.layers[max(index - 1, 0) : index + 1]
    return setting.tokens * sum(_host_bytes(layer, shape, setting, choices) for layer in layers)


def _stashed(index: int, choices: Choices) -> int:
    """Inputs that were made again for the layers from the last kept one up to this."""
    count = 0
    while choices.layers[index - count].inputs == "recompute":
        count += 1
    return count


def _optimizer(shape: MemoryShape, setting: Setting) -> dict[str, int]:
    _, gradients, _ = states(shape, setting)
    on_gpu = not get_engine(setting.engine).offloads
    return {**_resident(shape, setting), "gradients": on_gpu * gradients}  # AdamW is fused: it needs no more


def _host(shape: MemoryShape, setting: Setting, choices: Choices) -> dict[str, int]:
    of_rank = {
        "processes": PROCESS_ON_HOST,
        "kept for the backward": kept(shape, setting, choices, shape.num_layers)["host"],
    }
    if get_engine(setting.engine).offloads:
        weights, gradients, optimizer = states(shape, setting)
        of_rank |= {"weights": weights, "gradients": gradients, "optimizer state": optimizer}
    return {name: size * setting.local_ranks for name, size in of_rank.items() if size}
