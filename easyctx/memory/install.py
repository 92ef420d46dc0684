"""Putting memory choices into a model, whose own code stays as it is: forwards of its modules are replaced."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from easyctx.memory.choices import Choices
from easyctx.memory.layers import Layer
from easyctx.memory.spill import Spill
from easyctx.memory.tiles import Tiles

NORM_TILE = 16_384  # tokens
_POST_NORM = "post_feedforward_layernorm"  # Gemma: between the MLP and the residual stream
_TOKENWISE = (nn.Linear, nn.Identity, nn.SiLU, nn.GELU)
_EMPTY = (nn.ModuleDict, nn.ParameterDict)


class MemoryPlan:
    """Choices in force on a model. `remove` gives its modules their own forwards back."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.layers: list[Layer] = []
        self.mlps: list[Tiles] = []
        self.norms: list[Tiles] = []
        self.untiled: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def replace(self, module: Any, forward: Callable[..., Any]) -> None:
        """Put `forward` in the place of the module's; hooks around its call stay."""
        before = vars(module).get("forward")
        module.forward = forward
        self._undo.append(lambda: setattr(module, "forward", before) if before else delattr(module, "forward"))


def apply_choices(model: nn.Module, choices: Choices, spill: Spill | None = None) -> MemoryPlan:
    """Have a model's decoder layers keep, spill, recompute and tile as chosen.

    Args:
        model: a transformers causal LM, before an engine wraps it.
        spill: where what is kept on the host goes; needed if anything is.

    Raises:
        ValueError: choices that this model cannot honour.
    """
    layers = decoder_layers(model)
    if len(layers) != len(choices.layers):
        raise ValueError(f"choices for {len(choices.layers)} layers were given, and the model has {len(layers)}")
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    if has_dropout and any(layer.inputs == "recompute" for layer in choices.layers):
        raise ValueError(
            "this model has dropout, whose random numbers would be others when a layer's input is made again: keep "
            "every layer's input (--checkpoint-every 1)"
        )
    plan = MemoryPlan(choices)
    for module in layers:
        if choices.mlp_tile:
            _tile_mlp(plan, module, choices.mlp_tile)
        if choices.tiled_norms:
            _tile_norms(plan, module, besides=_POST_NORM if choices.mlp_tile else "")
    if choices.tiled_norms:
        _tile_norms(plan, decoder_of(model))
    for index, (module, choice) in enumerate(zip(layers, choices.layers, strict=True)):
        layer = Layer(module, index, choice, spill, has_dropout)
        if plan.layers:
            layer.previous = plan.layers[-1]
            layer.previous.has_next = True
        plan.layers.append(layer)
        plan.replace(module, layer)
    return plan


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a causal LM; ValueError if it does not have them where transformers' models do."""
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} has no list of decoder layers: choose --memory none")
    return list(layers)


def decoder_of(model: nn.Module) -> Any:
    """The part of a causal LM that holds its layers."""
    inner: Any = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner


def _tile_mlp(plan: MemoryPlan, layer: Any, tokens: int) -> None:
    mlp = getattr(layer, "mlp", None)
    if mlp is None or not is_tokenwise(mlp):
        plan.untiled.append(type(layer if mlp is None else mlp).__name__)
        return
    post_norm = getattr(layer, _POST_NORM, None)
    tiles = Tiles([mlp] if post_norm is None else [mlp, post_norm], tokens, is_last=True)
    if is_deepspeed_zero3_enabled():
        # The gradients of all its weights come at once, so the weights must be there at once too.
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(mlp, True)
    plan.mlps.append(tiles)
    plan.replace(mlp, tiles)
    if post_norm is not None:
        plan.replace(post_norm, _as_it_is)


def _tile_norms(plan: MemoryPlan, parent: nn.Module, besides: str = "") -> None:
    for name, module in parent.named_children():
        if type(module).__name__.endswith("RMSNorm") and name != besides:
            tiles = Tiles([module], NORM_TILE)
            plan.norms.append(tiles)
            plan.replace(module, tiles)


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def is_tokenwise(mlp: Any) -> bool:
    """Whether an MLP is matrices and activations alone: no routing to experts, no dropout, nothing unknown."""
    if not isinstance(getattr(mlp, "down_proj", None), nn.Module):
        return False
    leaves = [m for m in mlp.modules() if not any(m.children()) and not isinstance(m, _EMPTY)]
    return all(
        isinstance(m, _TOKENWISE) or type(m).__module__ == "transformers.activations" or _is_idle_dropout(m)
        for m in leaves
    )


def _is_idle_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0
