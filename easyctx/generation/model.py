"""A stock transformers model, called with our attention: what it attends to is a `Call`, and not its own cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from easyctx.capability import check_config
from easyctx.generation.calls import Call, Ranks
from easyctx.head import inner_model
from easyctx.mesh import Mesh
from easyctx.modes import check_mode, get_mode
from easyctx.patch import decoders_of
from easyctx.registry import IMPLEMENTATION, KEYWORD, inside_patch
from easyctx.rope import needs_global_length, use_global_length

# One process is a ring of one.
_ALONE = "ring_attn"


def make_ranks(mode: str, mesh: Mesh | None, config: Any, kernel: str = "auto", *, one_length: bool = False) -> Ranks:
    """The ranks that hold a context together under `mode`.

    one_length: kept keys will be used for texts of the very length that they were computed for.

    Raises:
        ValueError: a mode that does not fit the mesh, or a model (transformers configuration) whose attention over
            kept keys is not known to be exact.
    """
    mesh = mesh or Mesh()
    if get_mode(mode).is_sequence_parallel:
        check_mode(mode, mesh.sp_size, mesh.sp_size * mesh.dp_size, mesh.ring_degree)
    elif mesh.sp_size > 1:
        raise ValueError(f"{mode} has one rank to a context, but the mesh has {mesh.sp_size}: give no mesh, or a mode")
    spread = get_mode(mode if mesh.sp_size > 1 else _ALONE)
    check_config(config, spread, mesh.sp_size, mesh.ring_degree)
    if not one_length and needs_global_length(config):
        raise ValueError(
            f"the RoPE of this {config.get_text_config().model_type} configuration changes with the length "
            "(rope_type dynamic or longrope), so keys that are kept would be wrong for another one"
        )
    return Ranks(spread, mesh, kernel)


@contextmanager
def our_attention(model: nn.Module, largest_position: Callable[[], int] | None = None) -> Iterator[None]:
    """For the length of a `with`, the model's decoders ask our registry for their attention.

    largest_position: of the text that is in the model, for RoPE that looks at its length.
    """
    before = [(decoder, decoder.config._attn_implementation) for decoder in decoders_of(inner_model(model))]
    undo = []
    try:
        for decoder, implementation in before:
            if implementation != IMPLEMENTATION:
                decoder.set_attn_implementation(IMPLEMENTATION)
            if largest_position is not None and needs_global_length(decoder.config):
                undo.append(use_global_length(decoder, largest_position))
        yield
    finally:
        for restore in undo:
            restore()
        for decoder, implementation in before:
            if implementation != IMPLEMENTATION:
                decoder.set_attn_implementation(implementation)


def shards_weights(model: nn.Module) -> bool:
    """Whether an engine (ZeRO-3, FSDP2) gathers the weights for each call, for which all its ranks must make it."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters())


def run(model: nn.Module, call: Call, rows: list[int], device: torch.device) -> torch.Tensor:
    """Call the model (inside `our_attention`); logits `[len(rows), V]` of these rows of this rank's tokens.

    No rows cost one, which is thrown away: ranks whose weights are shared must all call the output head.
    """
    keep = torch.tensor(rows or [0], device=device)
    keywords: dict[str, Any] = {KEYWORD: call}
    with inside_patch():
        output = model(**call.inputs(device), use_cache=False, logits_to_keep=keep, **keywords)
    call.finish()
    return output.logits[0, : len(rows)]
