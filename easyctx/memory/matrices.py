"""A layer's linear modules by name, and what LoRA is asked for beside them."""

from dataclasses import dataclass

# Names of a layer's linear modules: those that work on a norm's result, and those behind them.
INTO_ATTENTION, INTO_MLP = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")
OUT_OF_ATTENTION, OUT_OF_MLP = ("o_proj",), ("down_proj",)
ATTENTION, MLP = INTO_ATTENTION + OUT_OF_ATTENTION, INTO_MLP + OUT_OF_MLP


@dataclass(frozen=True)
class Matrix:
    """A linear module of a layer, by its name; values of a token that go in and come out; how many layers have it."""

    name: str
    inputs: int
    outputs: int
    layers: int

    @property
    def parameters(self) -> int:
        """Of one layer."""
        return self.inputs * self.outputs


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
