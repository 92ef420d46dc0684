"""The monkey patch: a Hugging Face causal LM, unchanged, with distributed attention.

transformers asks a registry for its attention function and another for its mask; "easyctx" is a row in both. A
patched decoder's `forward` passes the patch's context down to the attention function as a keyword, so that models
which were not patched stay stock even where they share a configuration object with one that was.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

from easyctx.attention import Context, register_context, register_documents
from easyctx.backend import OWN, check_backend, check_backend_config
from easyctx.capability import check_config, check_family, needs_eager
from easyctx.documents import Documents
from easyctx.labels import refuse_labels, watch_family, watch_models
from easyctx.mesh import Mesh, num_processes
from easyctx.modes import WHOLE_SEQUENCE, Mode, check_mode, get_mode, make_mode_mesh
from easyctx.positions import Sequence, agree, compare_shards
from easyctx.registry import IMPLEMENTATION, KEYWORD, Batch, inside_patch
from easyctx.rope import needs_global_length, use_global_length


class SeqParallelPatch:
    """A patch in force. Undo it with `remove()`, or use it as a context manager."""

    def __init__(
        self,
        mode: Mode,
        mesh: Mesh | None,
        kernel: str,
        ring_degree: int | None = None,
        backend: str = OWN,
        head_groups: int = 1,
    ) -> None:
        self.mode, self.kernel, self.ring_degree = mode, kernel, ring_degree
        self.backend, self.head_groups = backend, head_groups
        self._mesh = mesh
        self._number: int | None = None
        self._undo: list[Callable[[], None]] = []
        self._undo_rope: list[Callable[[], None]] = []
        self._max_position = 0  # of the sequence that is in the decoder
        # The attention implementation that each patched decoder had.
        self._originals: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()

    @property
    def mesh(self) -> Mesh:
        """Resolved late, since a script may patch before it initialises torch.distributed."""
        if self._mesh is None:
            self._mesh = make_mode_mesh(self.mode.name, ring_degree=self.ring_degree)
        return self._mesh

    def remove(self) -> None:
        """Give every patched model its own attention back."""
        for undo in (*self._undo_rope, *self._undo):
            undo()
        self._undo_rope.clear()
        self._undo.clear()
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
            with inside_patch():
                return forward(decoder, *args, **kwargs)

        patched.easyctx_patch = self  # type: ignore[attr-defined]
        return patched

    def _adopt(self, decoder: PreTrainedModel) -> None:
        """Switch a decoder to our attention. It stays switched: checkpointed layers run again in the backward."""
        implementation = decoder.config._attn_implementation
        if implementation != IMPLEMENTATION or decoder not in self._originals:
            degrees = (self.mesh.sp_size, self.mesh.ring_degree)
            check_config(decoder.config, self.mode, *degrees)
            check_backend_config(self.backend, self.mode.name, decoder.config, *degrees)
            stock = "eager" if needs_eager(decoder.config) else "sdpa"
            self._originals[decoder] = implementation if implementation != IMPLEMENTATION else stock
            decoder.set_attn_implementation(IMPLEMENTATION)
            if needs_global_length(decoder.config):
                self._undo_rope.append(use_global_length(decoder, lambda: self._max_position))

    def _complete(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fill in what the forward of a sharded sequence needs: context, positions, documents, no cache."""
        if self._number is None:
            context = Context(self.mode, self.mesh, self.kernel, self.backend, self.head_groups)
            self._number = register_context(context)
        if kwargs.get("past_key_values") is not None:
            raise ValueError(
                f"{self.mode.name} shards the whole sequence: call the model without past_key_values; to generate, "
                "use easyctx.generation.Generator, or take the patch off first (patch.remove())"
            )
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        tokens = args[0] if tokens is None and args else tokens
        if tokens is None or len(args) > 1:
            raise ValueError("call a patched decoder with keywords: input_ids=…, position_ids=…")
        sequence = self._sequence(decoder, tokens, kwargs)
        self._max_position = sequence.max_position
        kwargs["use_cache"] = False
        kwargs[KEYWORD] = Batch(self._number, register_documents(sequence.documents))

    def _check_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.mesh.sp_size > 1:
            refuse_labels(model, args, kwargs, self.mode.name)

    def _sequence(self, decoder: PreTrainedModel, tokens: torch.Tensor, kwargs: dict[str, Any]) -> Sequence:
        """The documents and largest position of the batch; its position ids are put into `kwargs`."""
        mesh, local = self.mesh, tokens.shape[1]
        layout = self.mode.shard_layout(mesh.sp_size, mesh.ring_degree)
        length = local * mesh.sp_size
        positions, mask = kwargs.get("position_ids"), kwargs.pop("attention_mask", None)
        has_documents = any(kwargs.get(name) is not None for name in ("documents", "cu_seq_lens_q"))
        # To look at positions waits for the device: not where one rank knows the documents and asks for no more.
        is_read = mesh.sp_size > 1 or not has_documents or needs_global_length(decoder.config)
        shards = compare_shards(tokens, positions if is_read else None, mask, has_documents, layout, mesh)
        documents = _given_documents(kwargs, tokens.shape[0], length)
        if documents is None:
            sequence = agree(shards, positions, mask, layout, mesh)
        else:
            largest = documents.longest - 1 if positions is None else max(shard.top for shard in shards)
            sequence = Sequence(documents, largest)
        if positions is None:
            whole = torch.arange(length)[None] if documents is None else documents.position_ids()
            shard = layout.shard(whole, mesh.sp_size, mesh.sp_rank).to(tokens.device)
            kwargs["position_ids"] = shard.expand(tokens.shape[0], -1)
        return sequence


def _given_documents(kwargs: dict[str, Any], batch: int, length: int) -> Documents | None:
    """The documents that the call names, as `documents` or as transformers' cu_seq_lens; taken out of `kwargs`.

    Raises ValueError if they are not those of `batch` rows of the `length` tokens that the ranks hold together.
    """
    documents = kwargs.pop("documents", None)
    cu_seqlens = kwargs.pop("cu_seq_lens_q", None)
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    if documents is None and cu_seqlens is not None:
        documents = Documents.from_cu_seqlens(cu_seqlens, length)
    if documents is not None:
        documents.check_fits(batch, length)
    return documents


def apply_seq_parallel_monkey_patch(
    seq_algo: str,
    model: str | nn.Module,
    *,
    mesh: Mesh | None = None,
    ring_degree: int | None = None,
    kernel: str = "auto",
    backend: str = OWN,
    head_groups: int = 1,
) -> SeqParallelPatch:
    """Replace a model's attention by distributed attention over its sequence-parallel group.

    Args:
        seq_algo: a mode of `easyctx.modes.MODES`; "data_parallel" leaves (or makes) the model stock.
        model: a transformers model (also wrapped: PEFT, DDP), or a family name such as "llama", which holds for all
            models of that family, those made before and those made later.
        mesh: from `make_mesh`; default: all processes share each sequence.
        ring_degree: of `usp_attn`, where no mesh is given.
        kernel: one of `easyctx.kernel.KERNEL_CHOICES`.
        backend: one of `easyctx.backend.BACKENDS`: attention through another package, for comparison.
        head_groups: groups of key/value heads that are computed one after the other, which takes less memory.

    Returns:
        The patch; `.remove()` undoes it, and it is a context manager. Patching again replaces the earlier patch.

    Raises:
        ValueError: unknown mode, family or kernel; a sequence-parallel mode with one process; a model whose
            attention cannot be computed exactly (`easyctx.capability`); a backend that is not there, or lacks what
            mode or model want.
    """
    mode = get_mode(seq_algo)
    check_backend(backend, seq_algo, kernel)
    if mesh is None and num_processes() > 1 and mode.is_sequence_parallel:
        mesh = make_mode_mesh(seq_algo, ring_degree=ring_degree)
    if mesh is not None:
        degree = mesh.sp_size if mode.is_sequence_parallel else None
        check_mode(mode.name, degree, mesh.sp_size * mesh.dp_size, mesh.ring_degree)
    patch = SeqParallelPatch(mode, mesh, kernel, ring_degree, backend, head_groups)
    return _put_on(patch, model, mesh)


def use_own_attention(
    model: nn.Module, *, mesh: Mesh | None = None, kernel: str = "auto", head_groups: int = 1
) -> SeqParallelPatch:
    """The same attention where every process has whole sequences: our kernels, and results that can be kept.

    Args:
        mesh: one whose sequence-parallel axis is one rank; default: this process alone.

    Raises:
        ValueError: a model whose attention cannot be computed exactly (`easyctx.capability`).
    """
    mesh = mesh or Mesh()
    assert mesh.sp_size == 1
    return _put_on(SeqParallelPatch(WHOLE_SEQUENCE, mesh, kernel, head_groups=head_groups), model, mesh)


def _put_on(patch: SeqParallelPatch, model: str | nn.Module, mesh: Mesh | None) -> SeqParallelPatch:
    mode = patch.mode
    if isinstance(model, str):
        targets: list[Any] = [MODEL_MAPPING[CONFIG_MAPPING[check_family(model)]]]
    else:
        targets = list(decoders_of(model))
        for decoder in targets:
            degrees = (mesh.sp_size, mesh.ring_degree) if mesh is not None else ()
            check_config(decoder.config, mode, *degrees)
            check_backend_config(patch.backend, mode.name, decoder.config, *degrees)
    for target in targets:
        _replace_forward(patch, target)
    if mode.is_sequence_parallel:
        _watch_labels(patch, model)
    return patch


def _watch_labels(patch: SeqParallelPatch, model: str | nn.Module) -> None:
    """Have the causal LMs of a family, or the models with a head around an instance's decoders, refuse `labels`."""
    if not isinstance(model, str):
        patch._undo += watch_models(model, patch._check_labels)
        return

    def check(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(_own_patch(decoder) for decoder in decoders_of(head)):  # an instance's holds
            patch._check_labels(head, args, kwargs)

    patch._undo.append(watch_family(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[check_family(model)]], check))


def _own_patch(decoder: Any) -> Any:
    """The patch on this class, or on this instance itself."""
    return getattr(vars(decoder).get("forward"), "easyctx_patch", None)


def decoders_of(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The innermost transformers models in `model`: those that build masks and run layers."""
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    innermost = [m for m in found if not any(isinstance(c, PreTrainedModel) for c in m.modules() if c is not m)]
    if not innermost:
        raise ValueError(f"{type(model).__name__} holds no transformers model: give a PreTrainedModel or a family")
    yield from innermost


def _replace_forward(patch: SeqParallelPatch, target: Any) -> None:
    """Put the patch's forward on a class (family) or an instance, after taking an earlier patch off it."""
    earlier = _own_patch(target)
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
