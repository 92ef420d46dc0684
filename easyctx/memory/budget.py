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
    adapted_experts,
    largest_layer_bytes,
    largest_matrix,
    trained_by_layer,
    trained_in_layer,
    trained_in_mlp,
    trained_parameters,
)
from easyctx.memory.choices import Choices, LayerChoice, Place
from easyctx.memory.engines import ENGINES, get_engine, is_paged, muon_step_bytes
from easyctx.memory.loss import tiled_loss
from easyctx.memory.pinned import rounded_away
from easyctx.memory.setting import GIB, Setting, states
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

__all__ = [
    "ENGINES",
    "GIB",
    "Breakdown",
    "Choices",
    "LayerChoice",
    "MemoryShape",
    "Place",
    "Setting",
    "Widths",
    "predict",
    "states",
]

_ZERO3_LIVE = 1_000_000_000  # parameters that DeepSpeed keeps gathered, at most (stage3_max_live_parameters)


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
        of = [(layer, shape.kind(index)) for index, layer in enumerate(choices.layers)]
        known = {(layer, kind): kept_of(layer, shape.kinds[kind], setting.widths, choices) for layer, kind in set(of)}
        experts = [_merged_experts(kind, setting) for kind in shape.kinds]
        self.on_gpu = [
            setting.tokens * known[layer, kind]["gpu"] + layer.everything * experts[kind] for layer, kind in of
        ]
        self.on_host = [setting.tokens * known[each]["host"] for each in of]
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
    # Of layers that differ, the largest: it may not be the last one, before which as good as all is kept.
    layer = max(
        setting.tokens * forward_of_layer(kind, setting.widths, choices, setting.ring) + _merged_experts(kind, setting)
        for kind in shape.kinds
    )
    return {
        **_before_backward(shape, setting, kept),
        "on the way to the host": kept.on_host[-1],
        "forward of a layer": 0 if choices.layers[-1].everything else layer,
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
    of = [(layer, shape.kind(index)) for index, layer in enumerate(choices.layers)]
    sets = {(layer, kind): _working_set(layer, shape.kinds[kind], setting, choices) for layer, kind in set(of)}
    fresh = [_fresh_gradients(kind, setting, choices) for kind in shape.kinds]
    found, trained, by_layer = {}, max(trained_parameters(shape), 1), trained_by_layer(shape)
    done = trained - sum(by_layer)
    for index in reversed(range(shape.num_layers)):
        share = 1.0 if setting.accumulates else done / trained
        done += by_layer[index]
        found[f"backward of layer {index}"] = {
            **same,
            "gradients": 0 if engine.offloads else int(all_gradients * share),
            "gradients of a layer": fresh[of[index][1]],
            "kept for the backward": kept.first_on_gpu[index + 1],
            "back from the host": sum(kept.on_host[max(index - 1, 0) : index + 1]),
            "inputs made again": (kept.again_on[index] == "gpu") * kept.again[index],
            "backward of a layer": sets[of[index]],
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
    """The larger of attention's backward and the MLP's, for all tokens, and for one tile of the MLP.

    Adapted experts are there whole, and a gradient of as many of them as are one tensor.
    """
    widths, spread, tokens = setting.widths, (setting.kernel, setting.ring, setting.ulysses), setting.tokens
    tile = min(choices.mlp_tile, tokens) * mlp_inside(shape, widths)
    gradient = widths.compute * max(adapted_experts(shape))
    if layer.everything:
        return tokens * backward_of_unchecked(shape, widths, choices, *spread) + tile + gradient
    again = kept_attention(shape, widths) * (layer.attention == "recompute")
    again += kept_inputs(shape, widths) * (layer.inputs == "recompute")
    of_attention = backward_of_attention(shape, widths, choices, *spread) + again
    of_mlp = backward_of_mlp(shape, widths, choices) + again
    return max(tokens * of_attention, tokens * of_mlp + tile + _merged_experts(shape, setting) + gradient)


def _merged_experts(shape: MemoryShape, setting: Setting) -> int:
    """A layer's experts with their adapters added."""
    return setting.widths.compute * sum(adapted_experts(shape))


def _optimizer(shape: MemoryShape, setting: Setting) -> dict[str, int]:
    _, gradients, _ = states(shape, setting)
    on_gpu = not get_engine(setting.engine).offloads
    step = 0
    if setting.optimizer == "muon":  # AdamW is fused, and needs no more
        step = max(muon_step_bytes(m.inputs, m.outputs, setting.trained_bytes(shape)) for m in shape.matrices)
    return {**_resident(shape, setting), "gradients": on_gpu * gradients, "step of a matrix": step}


def _host(shape: MemoryShape, setting: Setting, kept: Kept) -> dict[str, int]:
    of_rank = {"processes": setting.process, "kept for the backward": kept.on_host_at_most()}
    if get_engine(setting.engine).offloads:
        weights, gradients, optimizer = states(shape, setting)
        of_rank |= {"weights": weights, "gradients": gradients, "optimizer state": optimizer}
        of_rank["rounding of pinned memory"] = rounded_away(shape, setting)
    elif is_paged(setting.optimizer):
        of_rank["optimizer state"] = states(shape, setting)[2]
    return {name: size * setting.local_ranks for name, size in of_rank.items() if size}
