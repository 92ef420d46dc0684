"""RoPE kinds whose frequencies depend on the length of the sequence, when a rank holds a part of it.

transformers takes the length to be the largest position id of the call, plus one
(`modeling_rope_utils.dynamic_rope_update`), and two kinds look at it:

- "dynamic" (NTK-aware scaling that grows): beyond `max_position_embeddings` the base follows the length. The module
  keeps the longest length so far, and goes back to the original base at a length within the original one.
- "longrope" (Phi-3; arXiv 2402.13753): one set of factors up to `original_max_position_embeddings`, another beyond.

A rank would take its own largest position, and ranks would rotate queries and keys by different angles. The other
kinds ("default", "linear", "yarn", "llama3", "proportional") are fixed by the configuration and need nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Kinds that are not known are taken to look at the length: to give them the right one costs one column.
_FIXED = frozenset({"default", "linear", "yarn", "llama3", "proportional"})


def needs_global_length(config: Any) -> bool:
    """Whether a model of this transformers configuration (its text part) has RoPE that looks at the length.

    Reads `rope_parameters`, also where it is nested by layer type (Gemma 3).
    """
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return _looks_at_length(parameters["rope_type"])
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return any(_looks_at_length(each.get("rope_type", "default")) for each in nested)


def switch_length(config: Any) -> int | None:
    """The length up to which longrope takes one set of factors, and beyond which another; None for other kinds."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters["original_max_position_embeddings"])


def use_global_length(decoder: nn.Module, max_position: Callable[[], int | torch.Tensor]) -> Callable[[], None]:
    """Make the RoPE modules of `decoder` that look at the length of the sequence see the whole one's.

    Their state is then that of one process which is called with the same sequences, on every rank: what a longer
    sequence changed ("dynamic") is changed on all ranks at the same call.

    Args:
        decoder: holds the modules, at any depth: those with a `rope_type`, whose forward is
            `(x, position_ids[, layer_type]) -> cos, sin` with position_ids `[…, S/P]` and cos, sin `[…, S/P, D]`.
        max_position: asked at each forward of such a module for the largest position id of a real token, over all
            rows of the batch and all ranks that share it: an int, or an integer scalar tensor on any device. Padding
            must not count: it could lie beyond the length at which frequencies change. Ids beyond it, those of
            padding, are lowered to it.

    Returns:
        A function that gives the modules their own forward back. Frequencies that a long sequence changed stay so,
        as they do in a stock model.
    """
    undo: list[Callable[[], None]] = []
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and _looks_at_length(kind) for kind in kinds):
            undo.append(_wrap(module, max_position))

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def _looks_at_length(kind: str) -> bool:
    return kind not in _FIXED


def _wrap(module: nn.Module, max_position: Callable[[], int | torch.Tensor]) -> Callable[[], None]:
    """Give `module` a forward that knows the largest position; returns what takes it off again."""
    earlier = vars(module).get("forward")  # hooks of accelerate and others sit on the instance
    # Where a patch told it of another sequence already, that is not asked.
    original = getattr(module.forward, "easyctx_untold", module.forward)

    @functools.wraps(original)
    def forward(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        largest = torch.as_tensor(max_position()).to(position_ids)
        column = largest.expand(*position_ids.shape[:-1], 1)
        positions = torch.cat([torch.minimum(position_ids, largest), column], dim=-1)
        return tuple(angle[..., :-1, :] for angle in original(x, positions, *args, **kwargs))

    forward.easyctx_untold = original  # type: ignore[attr-defined]

    def restore() -> None:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier

    module.forward = forward
    return restore
