"""The memory of a training step, in bytes: a model's shape, a setting and choices in, a breakdown out.

    shape = MemoryShape.from_config(AutoConfig.from_pretrained("meta-llama/Meta-Llama-3-8B"))
    setting = Setting(tokens=262_144 // 2, engine="fsdp2", ranks=2, ring=2)
    predict(shape, setting, Choices.alike(shape.num_layers)).gpu_peak

Pure: no GPU, no processes, no model. A step has a peak in each of a few moments (the forward of the last layer, the
loss, each layer's backward, the optimizer); the largest is the step's. Every term of it has a name.
"""

from dataclasses import dataclass, field
from itertools import accumulate

from easyctx.memory.adapters import (
    frozen_bytes,
    largest_layer_bytes,
    largest_matrix,
    trained_in_layer,
    trained_in_mlp,
    trained_parameters,
)
from easyctx.memory.choices import Choices, LayerChoice, Place
from easyctx.memory.engines import ENGINES, get_engine, is_paged, optimizer_bytes
from easyctx.memory.loss import tiled_loss
from easyctx.memory.pinned import rounded_away
from easyctx.memory.shape import MemoryShape
from easyctx.memory.working_set import (
    Widths,
    backward_of_attention,
    backward_of_mlp,
    backward_of_unchecked,
    forward_of_layer,
    keeps_little,
    kept_attention,
    kept_inputs,
    kept_of,
    mlp_inside,
    norm_kept,
)

__all__ = ["ENGINES", "Breakdown", "Choices", "LayerChoice", "MemoryShape", "Place", "Setting", "Widths", "predict"]

GIB = 2**30
_ZERO3_LIVE = 1_000_000_000  # parameters that DeepSpeed keeps gathered, at most (stage3_max_live_parameters)


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
    kept = Kept(shape, setting, choices)
    moments = {
        "forward of the last layer": _forward(shape, setting, choices, kept),
        "loss": _loss(shape, setting, choices, kept),
        **_backwards(shape, setting, choices, kept),
        "optimizer": _optimizer(shape, setting),
    }
    totals = {name: sum(terms.values()) for name, terms in moments.items()}
    worst = max(totals, key=lambda name: totals[name])
    gpu = {name: size for name, size in moments[worst].items() if size}
    return Breakdown(gpu, _host(shape, setting, kept), worst, totals)


class Kept:
    """What layers leave for their backwards, in bytes of one rank: by layer, and summed over the first ones."""

    def __init__(self, shape: MemoryShape, setting: Setting, choices: Choices) -> None:
        known = {layer: kept_of(layer, shape, setting.widths, choices) for layer in set(choices.layers)}
        self.on_gpu = [setting.tokens * known[layer]["gpu"] for layer in choices.layers]
        self.on_host = [setting.tokens * known[layer]["host"] for layer in choices.layers]
        self.first_on_gpu = [0, *accumulate(self.on_gpu)]
        # Inputs that were made again wait beside the one that was kept, for the layers between it and this.
        one, start = setting.tokens * kept_inputs(shape, setting.widths), 0
        self.again: list[int] = []
        self.again_on: list[Place] = []
        for index, layer in enumerate(choices.layers):
            start = start if layer.inputs == "recompute" and not layer.everything else index
            self.again.append(one * max(index - start - 1, 0))
            self.again_on.append(choices.layers[start].inputs)

    def on_host_at_most(self) -> int:
        """All that goes to the host, and the largest group of inputs that were made again and wait there too."""
        waiting = [size for size, place in zip(self.again, self.again_on, strict=True) if place == "host"]
        return sum(self.on_host) + max(waiting, default=0)


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
    gradients, optimizer = engine.gradients * scale, optimizer_bytes(engine, setting.optimizer) * scale
    return int(share * weights), int(share * gradients * trained), int(share * optimizer * trained)


def host_tensors(shape: MemoryShape, setting: Setting, choices: Choices) -> list[int]:
    """Bytes of each tensor that is on the host at once, of one rank: what its pool must hold."""
    c, e, tokens = setting.widths.compute, setting.widths.exact, setting.tokens
    inputs = tokens * kept_inputs(shape, setting.widths)
    found = []
    for layer in choices.layers:
        if layer.everything:
            continue
        found += [inputs] * (layer.inputs == "host")
        if layer.attention == "host":
            found += [tokens * c * shape.q_width, tokens * e * shape.q_heads]
    waiting = Kept(shape, setting, choices).on_host_at_most() - sum(found)
    return found + [inputs] * (waiting // inputs)


def _resident(shape: MemoryShape, setting: Setting) -> dict[str, int]:
    """On the GPU throughout: weights and optimizer state."""
    weights, _, optimizer = states(shape, setting)
    on_gpu = not get_engine(setting.engine).offloads
    stays = on_gpu and not is_paged(setting.optimizer)
    return {
        "weights": on_gpu * weights,
        "optimizer state": stays * optimizer,
        "a matrix out of 4 bits": setting.widths.compute * largest_matrix(shape),
    }


def _gathered(shape: MemoryShape, setting: Setting, backward: bool) -> int:
    """Whole weights in the compute dtype: of this layer and the next; at the end of the forward also of the head."""
    compute, engine = setting.widths.compute, get_engine(setting.engine)
    if not engine.gathers:
        # Autocast keeps a copy of all trained weights for the length of the forward, of one layer's in the backward.
        casts = setting.trained_bytes(shape) > compute
        return casts * compute * (trained_in_layer(shape) if backward else trained_parameters(shape))
    if setting.engine.startswith("zero3"):
        return compute * min(_ZERO3_LIVE, shape.parameters)
    return 2 * largest_layer_bytes(shape, compute) + (0 if backward else compute * shape.vocab * shape.hidden)


def _before_backward(shape: MemoryShape, setting: Setting, kept: Kept) -> dict[str, int]:
    """What is there at the end of the forward."""
    held = setting.accumulates and not get_engine(setting.engine).offloads
    return {
        **_resident(shape, setting),
        "gradients": held * states(shape, setting)[1],
        "gathered weights": _gathered(shape, setting, backward=False),
        "kept for the backward": kept.first_on_gpu[-1],
    }


def _forward(shape: MemoryShape, setting: Setting, choices: Choices, kept: Kept) -> dict[str, int]:
    layer = 0 if choices.layers[-1].everything else forward_of_layer(shape, setting.widths, choices, setting.ring)
    return {
        **_before_backward(shape, setting, kept),
        "on the way to the host": kept.on_host[-1],
        "forward of a layer": setting.tokens * layer,
    }


def _loss(shape: MemoryShape, setting: Setting, choices: Choices, kept: Kept) -> dict[str, int]:
    d, v, widths, tokens = shape.hidden, shape.vocab, setting.widths, setting.tokens
    hidden = (
        widths.stream * d
        + norm_kept(d, widths, keeps_little(shape, choices), not shape.keeps_normed)
        + widths.compute * d
    )
    hidden = tokens * (hidden + widths.stream * d * (widths.stream > widths.compute))
    if setting.tiled_loss:
        loss = tiled_loss(shape, widths, tokens, setting.fused_loss)
    else:
        loss = tokens * v * (2 * widths.exact + widths.compute)
    if not keeps_little(shape, choices):
        loss = max(loss, tokens * d * (4 * 4 + 2 * widths.compute))  # the last norm's backward, in float32
    return {**_before_backward(shape, setting, kept), "last hidden states": hidden, "loss": loss}


def _backwards(shape: MemoryShape, setting: Setting, choices: Choices, kept: Kept) -> dict[str, dict[str, int]]:
    """The backward of each layer: what earlier layers keep falls, what gradients take grows."""
    engine, (_, all_gradients, _) = get_engine(setting.engine), states(shape, setting)
    same = {**_resident(shape, setting), "gathered weights": _gathered(shape, setting, backward=True)}
    fresh = _fresh_gradients(shape, setting, choices)
    sets = {layer: _working_set(layer, shape, setting, choices) for layer in set(choices.layers)}
    found, trained = {}, max(trained_parameters(shape), 1)
    in_layers = shape.layer_parameters if shape.adapters is None else shape.num_layers * trained_in_layer(shape)
    for index in reversed(range(shape.num_layers)):
        done = trained - in_layers + in_layers * (shape.num_layers - 1 - index) // shape.num_layers
        share = 1.0 if setting.accumulates else done / trained
        found[f"backward of layer {index}"] = {
            **same,
            "gradients": 0 if engine.offloads else int(all_gradients * share),
            "gradients of a layer": fresh,
            "kept for the backward": kept.first_on_gpu[index + 1],
            "back from the host": sum(kept.on_host[max(index - 1, 0) : index + 1]),
            "inputs made again": (kept.again_on[index] == "gpu") * kept.again[index],
            "backward of a layer": sets[choices.layers[index]],
        }
    return found


def _fresh_gradients(shape: MemoryShape, setting: Setting, choices: Choices) -> int:
    """A layer's gradients as its backward makes them, and as they are sent; or a tile's of the MLP, and their sums."""
    engine, widths = get_engine(setting.engine), setting.widths
    each = widths.compute if engine.gathers else setting.trained_bytes(shape)
    whole = each * (2 if engine.gathers else 1) * trained_in_layer(shape)
    tiled = (each + widths.exact) * trained_in_mlp(shape) if choices.mlp_tile else 0
    return max(whole, tiled)


def _working_set(layer: LayerChoice, shape: MemoryShape, setting: Setting, choices: Choices) -> int:
    """The larger of attention's backward and the MLP's, for all tokens, and for one tile of the MLP."""
    widths, spread, tokens = setting.widths, (setting.kernel, setting.ring, setting.ulysses), setting.tokens
    tile = min(choices.mlp_tile, tokens) * mlp_inside(shape, widths)
    if layer.everything:
        return tokens * backward_of_unchecked(shape, widths, choices, *spread) + tile
    again = kept_attention(shape, widths) * (layer.attention == "recompute")
    again += kept_inputs(shape, widths) * (layer.inputs == "recompute")
    of_attention = backward_of_attention(shape, widths, choices, *spread) + again
    of_mlp = backward_of_mlp(shape, widths, choices) + again
    return max(tokens * of_attention, tokens * of_mlp + tile)


def _optimizer(shape: MemoryShape, setting: Setting) -> dict[str, int]:
    _, gradients, _ = states(shape, setting)
    on_gpu = not get_engine(setting.engine).offloads
    return {**_resident(shape, setting), "gradients": on_gpu * gradients}  # AdamW is fused: it needs no more


def _host(shape: MemoryShape, setting: Setting, kept: Kept) -> dict[str, int]:
    of_rank = {"processes": setting.process, "kept for the backward": kept.on_host_at_most()}
    if get_engine(setting.engine).offloads:
        weights, gradients, optimizer = states(shape, setting)
        of_rank |= {"weights": weights, "gradients": gradients, "optimizer state": optimizer}
        of_rank["rounding of pinned memory"] = rounded_away(shape, setting)
    elif is_paged(setting.optimizer):
        of_rank["optimizer state"] = states(shape, setting)[2]
    return {name: size * setting.local_ranks for name, size in of_rank.items() if size}
