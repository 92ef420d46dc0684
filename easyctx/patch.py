"""The monkey patch: a Hugging Face causal LM, unchanged, with distributed attention.

transformers asks a registry for its attention function and another for its mask; "easyctx" is a row in both. A
patched decoder's `forward` passes the patch's context down to the attention function as a keyword, so that models
which were not patched stay stock even where they share a configuration object with one that was.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from easyctx.attention import Context, register_context, seq_parallel_attention
from easyctx.capability import check_call, check_config, check_family
from easyctx.mesh import Mesh, make_mesh, num_processes
from easyctx.modes import Mode, check_mode, get_mode

IMPLEMENTATION = "easyctx"
KEYWORD = "easyctx_context"

_state = threading.local()


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that transformers calls: q `[B, H, S, D]`, k and v `[B, K, S, D]` -> `[B, S, H, D]`."""
    context = kwargs.pop(KEYWORD, None)
    if context is None:
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    check_call(kwargs.get("softcap"), kwargs.get("s_aux"), dropout)
    if torch.is_autocast_enabled(query.device.type):
        autocast = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"attention got mixed dtypes: q {query.dtype}, k {key.dtype}, v {value.dtype}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = kwargs.get("sliding_window") or 0
    out, _ = seq_parallel_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, window, context
    )
    return out, None


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask function that transformers calls: nothing to build, but a mask that hides tokens is not dropped."""
    if not getattr(_state, "depth", 0):
        return sdpa_mask(**kwargs)
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"attention_mask hides {int((~mask.bool()).sum())} of {mask.numel()} tokens of this shard, which "
            "sequence parallelism does not support: pad on the right, give the padding the label -100 and leave "
            "attention_mask out (causal attention never looks at what follows)"
        )
    return None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


class SeqParallelPatch:
    """A patch in force. Undo it with `remove()`, or use it as a context manager."""

    def __init__(self, mode: Mode, mesh: Mesh | None, kernel: str) -> None:
        self.mode, self.kernel = mode, kernel
        self._mesh = mesh
        self._number: int | None = None
        self._undo: list[Callable[[], None]] = []
        self._checked: set[tuple[int, int]] = set()
        # The attention implementation that each patched decoder had.
        self._originals: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()

    @property
    def mesh(self) -> Mesh:
        """Resolved late, since a script may patch before it initialises torch.distributed."""
        if self._mesh is None:
            check_mode(self.mode.name, None, num_processes())
            self._mesh = make_mesh()
        return self._mesh

    def remove(self) -> None:
        """Give every patched model its own attention back."""
        while self._undo:
            self._undo.pop()()
        for decoder, implementation in list(self._originals.items()):
            decoder.set_attn_implementation(implementation)
        self._originals.clear()

    def __enter__(self) -> "SeqParallelPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def patched(decoder: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            if KEYWORD in kwargs:  # an instance patch inside a family patch: the instance's holds
                return forward(decoder, *args, **kwargs)
            self._adopt(decoder)
            self._complete(decoder, args, kwargs)
            with _inside_patch():
                return forward(decoder, *args, **kwargs)

        patched.easyctx_patch = self  # type: ignore[attr-defined]
        return patched

    def _adopt(self, decoder: PreTrainedModel) -> None:
        """Switch a decoder to our attention. It stays switched: checkpointed layers run again in the backward."""
        implementation = decoder.config._attn_implementation
        if implementation != IMPLEMENTATION or decoder not in self._originals:
            check_config(decoder.config, self.mode, self.mesh.sp_size)
            self._originals[decoder] = implementation if implementation != IMPLEMENTATION else "sdpa"
            decoder.set_attn_implementation(IMPLEMENTATION)

    def _complete(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fill in what the forward of a sharded sequence needs: context, positions, no cache."""
        if self._number is None:
            self._number = register_context(Context(self.mode, self.mesh, self.kernel))
        kwargs[KEYWORD] = self._number
        if kwargs.get("past_key_values") is not None:
            raise ValueError(f"{self.mode.name} shards the whole sequence: call the model without past_key_values")
        kwargs["use_cache"] = False
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        tokens = args[0] if tokens is None and args else tokens
        if tokens is None or len(args) > 1:
            raise ValueError("call a patched decoder with keywords: input_ids=…, position_ids=…")
        kwargs["position_ids"] = self._positions(tokens, kwargs.get("position_ids"))

    def _positions(self, tokens: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """Position ids `[B, S/P]` of this shard: the layout's, made here or checked once for each length."""
        mesh, local = self.mesh, tokens.shape[1]
        key = (local, mesh.sp_size)
        if given is not None and key in self._checked:
            return given
        positions = self.mode.layout.positions(local * mesh.sp_size, mesh.sp_size, mesh.sp_rank).to(tokens.device)
        if given is None:
            return positions.expand(tokens.shape[0], -1)
        if given.shape[-1] != local or not bool((given == positions).all()):
            raise ValueError(
                f"position_ids of rank {mesh.sp_rank} are not those of the {self.mode.layout.name} layout for "
                f"{local} of {local * mesh.sp_size} tokens (given {_ends(given)}, expected {_ends(positions)}): "
                "take them from prepare_seq_parallel_inputs, or leave them out"
            )
        self._checked.add(key)
        return given


def apply_seq_parallel_monkey_patch(
    seq_algo: str, model: str | nn.Module, *, mesh: Mesh | None = None, kernel: str = "auto"
) -> SeqParallelPatch:
    """Replace a model's attention by distributed attention over its sequence-parallel group.

    Args:
        seq_algo: a mode of `easyctx.modes.MODES`; "data_parallel" leaves (or makes) the model stock.
        model: a transformers model (also wrapped: PEFT, DDP), or a family name such as "llama", which holds for all
            models of that family, those made before and those made later.
        mesh: from `make_mesh`; default: all processes share each sequence.
        kernel: one of `easyctx.kernel.KERNEL_CHOICES`.

    Returns:
        The patch; `.remove()` undoes it, and it is a context manager. Patching again replaces the earlier patch.

    Raises:
        ValueError: unknown mode, family or kernel; a sequence-parallel mode with one process; a model whose
            attention cannot be computed exactly (`easyctx.capability`).
    """
    mode = get_mode(seq_algo)
    if mesh is None and num_processes() > 1 and mode.is_sequence_parallel:
        mesh = make_mesh()
    if mesh is not None:
        check_mode(mode.name, mesh.sp_size if mode.is_sequence_parallel else None, mesh.sp_size * mesh.dp_size)
    patch = SeqParallelPatch(mode, mesh, kernel)
    if isinstance(model, str):
        check_family(model)
        targets: list[Any] = [MODEL_MAPPING[CONFIG_MAPPING[model]]]
    else:
        targets = list(_decoders(model))
        for decoder in targets:
            check_config(decoder.config, mode, mesh.sp_size if mesh is not None else None)
    for target in targets:
        _replace_forward(patch, target)
    return patch


def _decoders(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The innermost transformers models in `model`: those that build masks and run layers."""
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    innermost = [m for m in found if not any(isinstance(c, PreTrainedModel) for c in m.modules() if c is not m)]
    if not innermost:
        raise ValueError(f"{type(model).__name__} holds no transformers model: give a PreTrainedModel or a family")
    yield from innermost


def _replace_forward(patch: SeqParallelPatch, target: Any) -> None:
    """Put the patch's forward on a class (family) or an instance, after taking an earlier patch off it."""
    earlier = getattr(vars(target).get("forward"), "easyctx_patch", None)
    if earlier is not None:
        earlier.remove()
    if not patch.mode.is_sequence_parallel:
        return
    if isinstance(target, type):
        family: Any = target
        original = family.forward
        family.forward = patch._wrap(original)
        patch._undo.append(lambda: setattr(family, "forward", original))
    else:
        target.forward = MethodType(patch._wrap(type(target).forward), target)
        patch._undo.append(lambda: delattr(target, "forward"))


@contextmanager
def _inside_patch() -> Iterator[None]:
    """Tells the mask function that the decoder which is running is a patched one."""
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        yield
    finally:
        _state.depth -= 1


def _ends(positions: torch.Tensor) -> str:
    row = positions.reshape(-1, positions.shape[-1])[0].tolist()
    return f"{row[0]} … {row[-1]}" if len(row) > 4 else str(row)
