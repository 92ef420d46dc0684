"""What the position ids and attention masks of a sharded batch say of the whole of it.

Each rank sees its shard alone, and a wrong guess would be wrong silently or hang the others. So the ranks of a
sequence compare a few numbers before each forward, and all of them come to the same conclusion, or the same error.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from easyctx.documents import Documents
from easyctx.layout import Layout
from easyctx.mesh import Mesh

# Of what a rank was given: the layout's positions, others, or something that does not fit its shard.
PLAIN, OTHER, MISFIT = 0, 1, 2
GIVEN = {1: "position_ids", 2: "an attention_mask", 4: "documents"}

_BATCH = "easyctx_batch"  # attribute of a tensor


class Report(NamedTuple):
    """What a rank says of its shard: rows and tokens, the number of the batch that it is of (0: not known), a sum of
    `GIVEN`, and of its positions the kind (above), the largest given and the largest held."""

    batch: int
    local: int
    number: int
    given: int
    kind: int
    top: int
    end: int


@dataclass(frozen=True)
class Sequence:
    """What the ranks found: the documents (None for one to a row), and the largest position of the sequence."""

    documents: Documents | None
    max_position: int


def note_batch(shard: torch.Tensor, whole_ids: torch.Tensor) -> None:
    """Have a shard of token ids carry a number of the whole batch, by which ranks see that they share one."""
    setattr(shard, _BATCH, getattr(whole_ids, _BATCH, 0) or batch_number(whole_ids))


def number_batch(whole_ids: torch.Tensor) -> int:
    """The number of a whole batch, which its tensor carries from now on, so that sharding it does not compute it again.

    The tensor is to stay as it is.
    """
    number = batch_number(whole_ids)
    setattr(whole_ids, _BATCH, number)
    return number


def batch_number(ids: torch.Tensor) -> int:
    """A number from 1 to 2^62 of whole rows `[B, S]`; hardly ever that of others, or of the same in another order."""
    places = torch.arange(1, ids.numel() + 1, device=ids.device)
    return (int((ids.flatten().to(torch.int64) * places).sum()) * 31 + len(ids)) % 2**62 or 1


def compare_shards(
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    has_documents: bool,
    layout: Layout,
    mesh: Mesh,
) -> list[Report]:
    """What the ranks of a sequence hold and were given.

    Args:
        tokens: `[B, S/P]` ids, or `[B, S/P, …]` embeddings.
        position_ids, attention_mask: `[B, S/P]` or None.

    Raises:
        ValueError: on all ranks, for shards of different shapes or of different batches, for something that only some
            were given, and for what does not fit a shard; their later messages would not fit each other.
    """
    batch, local = tokens.shape[:2]
    are_there = (position_ids is not None, attention_mask is not None, has_documents)
    given = sum(bit for bit, is_there in zip(GIVEN, are_there, strict=True) if is_there)
    misfit = _misfit(position_ids, attention_mask, batch, local)
    mine = layout.positions(local * mesh.sp_size, mesh.sp_size, mesh.sp_rank)
    end = int(mine[-1])
    kind = (MISFIT, end) if misfit else _kind(position_ids, mine)
    number = getattr(tokens, _BATCH, 0)
    reports = [Report(*report) for report in _exchange([batch, local, number, given, *kind, end], mesh)]
    first = reports[0]
    for rank, report in enumerate(reports):
        if report[:2] != first[:2]:
            raise ValueError(
                f"rank {rank} of the sequence holds {report.batch} rows of {report.local} tokens, and rank 0 "
                f"{first.batch} of {first.local}: all ranks of a sequence must shard the same batch "
                "(prepare_dataloader sees to it)"
            )
        if report.number != first.number and report.number and first.number:
            raise ValueError(
                f"rank {rank} of the sequence holds a shard of other rows than rank 0: all ranks of a sequence must "
                "shard the same batch, in the same order (prepare_dataloader sees to it)"
            )
        if report.given != first.given:
            raise ValueError(
                f"rank {rank} of the sequence was given {_names(report.given)}, and rank 0 {_names(first.given)}: give "
                "all of them the same"
            )
    if misfit:
        raise ValueError(misfit)
    for rank, report in enumerate(reports):
        if report.kind == MISFIT:
            raise ValueError(
                f"rank {rank} of the sequence was given {_names(report.given)} of another shape than its {local} tokens"
            )
    return reports


def agree(
    reports: list[Report],
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    layout: Layout,
    mesh: Mesh,
) -> Sequence:
    """What position ids and attention mask say of the whole sequence, of which the ranks gave these reports.

    Raises:
        ValueError: on all ranks alike, for positions that are neither the layout's nor those of packed documents, and
            for a mask that hides anything but padding on the right.
    """
    local = reports[0].local
    length = local * mesh.sp_size
    if attention_mask is not None:
        mine = layout.positions(length, mesh.sp_size, mesh.sp_rank)
        _check_masks(_exchange(_report_mask(attention_mask, mine), mesh))
    largest = max(report.top for report in reports)
    # Positions may end early: padding repeats the last one.
    if all(report.kind == PLAIN and report.top == min(report.end, largest) for report in reports):
        return Sequence(None, largest)
    assert position_ids is not None
    whole = _gather(position_ids, layout, mesh)
    restarts = whole[:, 1:][whole.diff(dim=1) < 0]
    if len(restarts) and not bool(restarts.any()):
        return Sequence(Documents.from_position_ids(whole), int(whole.max()))
    if mesh.sp_size == 1 and attention_mask is not None:
        # As transformers reads them: beside a mask, positions with gaps (PoSE's) are RoPE's alone.
        return Sequence(None, int(whole.max()))
    expected = torch.arange(length).clamp(max=largest)
    row, place = (int(i) for i in (whole != expected).nonzero()[0])
    raise ValueError(
        f"position_ids are not those of the {layout.name} layout for {local} of {length} tokens: row {row} has "
        f"{int(whole[row, place])} where the layout holds position {place}. Take them from "
        "prepare_seq_parallel_inputs (with the mode that the model was patched with), or leave them out"
    )


def _names(given: int) -> str:
    return " and ".join(name for bit, name in GIVEN.items() if given & bit) or "nothing beside its tokens"


def _misfit(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, batch: int, local: int
) -> str | None:
    """What does not fit this rank's shard, in words."""
    if position_ids is not None and position_ids.shape[-1] != local:
        return f"position_ids has {position_ids.shape[-1]} columns, input_ids {local}: give both of the same shard"
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, local):
        return (
            f"attention_mask has shape {tuple(attention_mask.shape)}, and the shard {batch} rows of {local} tokens: "
            "give a mask [batch, tokens] of the shard, or none"
        )
    return None


def _kind(position_ids: torch.Tensor | None, mine: torch.Tensor) -> tuple[int, int]:
    """(kind, largest position given) of a shard whose positions are `mine`."""
    if position_ids is None:
        return PLAIN, int(mine[-1])
    top = position_ids.max()
    is_plain = (position_ids == torch.minimum(mine.to(position_ids.device), top)).all()
    kind, largest = torch.stack([is_plain.logical_not().to(top.dtype), top]).tolist()
    return (OTHER if kind else PLAIN), largest


def _report_mask(mask: torch.Tensor, mine: torch.Tensor) -> list[int]:
    """For every row of the batch the last position that is visible and the first that is hidden."""
    visible = mask.bool().cpu()
    last_visible = torch.where(visible, mine, -1).amax(1)
    first_hidden = torch.where(visible, torch.iinfo(torch.int64).max, mine).amin(1)
    return torch.stack([last_visible, first_hidden], dim=1).flatten().tolist()


def _check_masks(reports: list[list[int]]) -> None:
    for row in range(len(reports[0]) // 2):
        last_visible = max(report[2 * row] for report in reports)
        first_hidden = min(report[2 * row + 1] for report in reports)
        if first_hidden < last_visible:
            raise ValueError(
                f"attention_mask hides position {first_hidden} of row {row} and shows position {last_visible} behind "
                "it, which sequence parallelism does not support: pad on the right, with the label -100 (causal "
                "attention never looks at what follows), or pack documents with `documents`"
            )


def _exchange(report: list[int], mesh: Mesh) -> list[list[int]]:
    """Every rank's report, in rank order."""
    if mesh.sp_size == 1:
        return [report]
    device = _device(mesh)
    mine = torch.tensor(report, dtype=torch.int64, device=device)
    reports = [torch.empty_like(mine) for _ in range(mesh.sp_size)]
    dist.all_gather(reports, mine, group=mesh.sp_group)
    return torch.stack(reports).tolist()


def _gather(position_ids: torch.Tensor, layout: Layout, mesh: Mesh) -> torch.Tensor:
    """All position ids in global order, `[B, S]` on the host."""
    if mesh.sp_size == 1:
        return position_ids.cpu()
    local = position_ids.to(_device(mesh)).contiguous()
    shards = [torch.empty_like(local) for _ in range(mesh.sp_size)]
    dist.all_gather(shards, local, group=mesh.sp_group)
    return layout.unshard(shards).cpu()


def _device(mesh: Mesh) -> torch.device:
    """Where the group's collectives run."""
    is_nccl = "nccl" in str(dist.get_backend(mesh.sp_group))
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
