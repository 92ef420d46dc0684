"""What a collator made, read as whole sequences and cut into this rank's shard."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from easyctx.documents import Documents
from easyctx.inputs import IGNORE_INDEX, prepare_seq_parallel_inputs, shift_labels
from easyctx.mesh import Mesh

READ = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids")
# Said again by the position ids, or for the kernels of a model's own attention.
LEFT_OUT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "use_cache")


@dataclass(frozen=True)
class WholeBatch:
    """Whole sequences, int64 `[B, S]`.

    targets: shifted already, -100 where there is no loss; None for a batch without labels.
    documents: of packed rows; None where every row is one document.
    tokens: how many are no padding.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor | None
    documents: Documents | None
    tokens: int


def read_batch(batch: Mapping[str, Any]) -> WholeBatch:
    """The sequences, targets and document borders of a collated batch.

    Raises ValueError for inputs that are not known here, padding that is not on the right, padding with a label, and
    position ids that do not count up from 0 in every document.
    """
    unknown = [name for name in batch if name not in (*READ, *LEFT_OUT) and batch[name] is not None]
    if unknown:
        raise ValueError(
            f"the batch holds {', '.join(unknown)}, which sequence parallelism does not shard: it takes "
            f"{', '.join(READ)}. Leave the others out of the dataset or the collator"
        )
    input_ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    for name in READ[1:]:
        given = batch.get(name)
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, input_ids {tuple(input_ids.shape)}")
    if mask is not None:
        _check_padding(mask.bool(), labels)
    documents = _documents(batch)
    targets = batch.get("shift_labels")
    if targets is None and labels is not None:
        targets = shift_labels(labels, documents)
    return WholeBatch(input_ids, targets, documents, input_ids.numel() if mask is None else int(mask.bool().sum()))


def _check_padding(visible: torch.Tensor, labels: torch.Tensor | None) -> None:
    if bool((visible[:, 1:] & ~visible[:, :-1]).any()):
        row = int((visible[:, 1:] & ~visible[:, :-1]).any(1).nonzero()[0])
        raise ValueError(
            f"attention_mask hides tokens of row {row} and shows later ones: pad on the right "
            '(tokenizer.padding_side = "right"), or pack documents with position ids that begin again at 0'
        )
    if labels is not None and bool(((labels != IGNORE_INDEX) & ~visible).any()):
        row = int(((labels != IGNORE_INDEX) & ~visible).any(1).nonzero()[0])
        raise ValueError(f"row {row} has labels on tokens that attention_mask hides: label padding with -100")


def _documents(batch: Mapping[str, Any]) -> Documents | None:
    """From position ids or cumulated lengths; None for rows of one document each."""
    positions, mask, lengths = batch.get("position_ids"), batch.get("attention_mask"), batch.get("cu_seq_lens_q")
    if positions is not None:
        positions = positions.cpu()
        if mask is not None:  # nothing attends to padding, so that its positions may be anything
            last = (mask.bool().sum(1, keepdim=True).cpu() - 1).clamp(min=0)
            index = torch.arange(positions.shape[1])
            positions = torch.where(index <= last, positions, positions.gather(1, last) + index - last)
        documents = Documents.from_position_ids(positions)
    elif lengths is not None:
        documents = Documents.from_cu_seqlens(lengths, batch["input_ids"].shape[1])
    else:
        return None
    return None if documents.is_plain else documents


def shard_batch(
    whole: WholeBatch, mode: str, mesh: Mesh, device: torch.device
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Keywords of the model's call and targets of this rank, `[B, S'/P]`, S' being padded to the layout's multiple."""
    local = prepare_seq_parallel_inputs(
        mode,
        whole.input_ids,
        None,
        whole.targets,
        mesh.sp_rank,
        mesh.sp_size,
        device,
        documents=whole.documents,
        ring_degree=mesh.ring_degree,
    )
    targets = local.pop("local_target_ids")
    return {name.removeprefix("local_"): given for name, given in local.items()}, targets
