"""What can be chosen about a step's memory: for each layer what is kept and where, for the rest how it is computed."""

from dataclasses import dataclass, replace
from typing import Literal

Place = Literal["gpu", "host", "recompute"]


@dataclass(frozen=True)
class LayerChoice:
    """What one decoder layer leaves behind for its backward.

    inputs: where the layer's input is kept; "recompute" makes it again from the layer before (one checkpoint to
        several layers).
    attention: where attention's output and log-sum-exp are kept; "recompute" runs attention again.
    everything: keep all activations, as a model without checkpoints does; the other two are then of no account.
    """

    inputs: Place = "gpu"
    attention: Place = "gpu"
    everything: bool = False


@dataclass(frozen=True)
class Choices:
    """All choices of a step.

    mlp_tile: tokens of a tile of the MLP, whose activations exist one tile at a time; 0 for the whole shard at once.
    tiled_norms: norms keep only their input.
    head_groups: attention runs over so many groups of key/value heads, one after the other.
    """

    layers: tuple[LayerChoice, ...]
    mlp_tile: int = 0
    tiled_norms: bool = False
    head_groups: int = 1

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if (
                layer.inputs == "recompute"
                and not layer.everything
                and (index == 0 or self.layers[index - 1].everything)
            ):
                raise ValueError(
                    f"the input of layer {index} has no checkpointed layer before it to be made again from"
                )

    @classmethod
    def alike(cls, num_layers: int, layer: LayerChoice | None = None, every: int = 1, **rest: int | bool) -> "Choices":
        """The same for all layers, with one kept input to `every` layers."""
        layer = layer or LayerChoice()
        skipped = replace(layer, inputs="recompute")
        layers = tuple(skipped if index % every else layer for index in range(num_layers))
        return cls(layers, **rest)  # type: ignore[arg-type]
