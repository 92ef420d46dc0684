"""What choices add to a step: the seconds of what is computed again, so that they can be compared."""

from dataclasses import replace

from easyctx.memory.budget import Choices, LayerChoice, MemoryShape

_LINEAR_RATE, _ATTENTION_RATE = 700e12, 600e12  # FLOP/s of an H200, about
# What tiles, groups and the way to the host cost beside recomputation, as parts of a layer's forward.
_MLP_SHARE = 0.8  # of a layer's matrices
_SMALL = {"tiles": 0.06, "norms": 0.03, "groups": 0.02, "host": 0.005}


def least_work(way: tuple[Choices, int], shape: MemoryShape, length: int) -> float:
    """`work_again` if everything could be kept this way."""
    rest, every = way
    layers = Choices.alike(shape.num_layers, LayerChoice(everything=every == 1), every).layers
    return work_again(replace(rest, layers=layers), shape, length)


def work_again(choices: Choices, shape: MemoryShape, length: int) -> float:
    """Seconds a token, about, that these choices add to a step that recomputes nothing."""
    linears = [2 * _active_parameters(kind) / _LINEAR_RATE for kind in shape.kinds]
    attention = 2 * shape.q_width * length / _ATTENTION_RATE
    seconds = 0.0
    for index, layer in enumerate(choices.layers):
        follower = choices.layers[index + 1] if index + 1 < len(choices.layers) else None
        is_rerun = follower is not None and follower.inputs == "recompute" and not follower.everything
        reruns = (not layer.everything) + is_rerun
        linear = linears[shape.kind(index)]
        seconds += linear * reruns
        if layer.everything and choices.mlp_tile:
            seconds += linear * _MLP_SHARE
        if layer.attention == "recompute" and not layer.everything:
            seconds += attention * reruns
        seconds += _SMALL["host"] * linear * ((layer.inputs == "host") + (layer.attention == "host"))
    extras = _SMALL["tiles"] * bool(choices.mlp_tile) + _SMALL["norms"] * choices.tiled_norms
    extras += _SMALL["groups"] * (choices.head_groups - 1)
    return seconds + extras * sum(linears[shape.kind(index)] for index in range(len(choices.layers)))


def _active_parameters(kind: MemoryShape) -> int:
    """Of a layer, those that one token meets."""
    idle = kind.experts - kind.active_experts
    return kind.largest_layer - 3 * idle * kind.hidden * kind.intermediate
