"""What the position ids and attention masks of a sharded batch say of the whole of it.

Each rank sees its shard alone, and a wrong guess would be wrong silently or hang the others. So the ranks of a
sequence compare a few numbers before each forward, and all of them come to the same conclusion, or the same error.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from easyctx.documents import Documents
from easyctx.layout import Layout
from easyctx.mesh import Mesh

# What a rank reports.
PLAIN, RESETS = 0, 1


@dataclass(frozen=True)
class Sequence:
    """What the ranks found: the documents (None for one to a row), and the largest position of the sequence."""

    documents: Documents | None
    max_position: int


def agree(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    layout: Layout,
    mesh: Mesh,
    batch: int,
    local: int,
) -> Sequence:
    """Look at position ids and attention mask, each `[B, S/P]` or None, together with the other ranks.

    Raises:
        ValueError: on all ranks alike, for shards of different shapes, for positions that are neither the layout's nor
            those of packed documents, and for a mask that hides anything but padding on the right.
    """
    length = local * mesh.sp_size
    if position_ids is None and attention_mask is None:
        return Sequence(None, length - 1)
    mine = layout.positions(length, mesh.sp_size, mesh.sp_rank)
    of_mask = _report_mask(attention_mask, mine)
    reports = _exchange([*_report_positions(position_ids, mine), batch, local, len(of_mask)], mesh)
    _check_shapes([r[3:] for r in reports])
    if of_mask:
        _check_masks(_exchange(of_mask, mesh))
    largest = max(r[1] for r in reports)
    # Positions may end early: padding repeats the last one.
    if all(kind == PLAIN and top == min(end, largest) for kind, top, end, *_ in reports):
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


def largest_position(position_ids: torch.Tensor | None, documents: Documents, mesh: Mesh) -> int:
    """The largest position of a sequence whose documents are known, over all ranks that share it."""
    if position_ids is None:
        return documents.longest - 1
    return max(report[0] for report in _exchange([int(position_ids.max())], mesh))


def _report_positions(position_ids: torch.Tensor | None, mine: torch.Tensor) -> tuple[int, int, int]:
    """(kind, largest position given, largest position held) of this shard."""
    end = int(mine[-1])
    if position_ids is None:
        return PLAIN, end, end
    if position_ids.shape[-1] != len(mine):
        raise ValueError(f"position_ids has {position_ids.shape[-1]} columns, input_ids {len(mine)}")
    top = position_ids.max()
    is_plain = (position_ids == torch.minimum(mine.to(position_ids.device), top)).all()
    kind, largest = torch.stack([is_plain.logical_not().to(top.dtype), top]).tolist()
    return (RESETS if kind else PLAIN), largest, end


def _report_mask(mask: torch.Tensor | None, mine: torch.Tensor) -> list[int]:
    """For every row of the batch the last position that is visible and the first that is hidden."""
    if mask is None:
        return []
    if mask.dim() != 2 or mask.shape[1] != len(mine):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and the shard {len(mine)} tokens: give a mask [batch, "
            "tokens] of the shard, or none"
        )
    visible, positions = mask.bool().cpu(), mine
    last_visible = torch.where(visible, positions, -1).amax(1)
    first_hidden = torch.where(visible, torch.iinfo(torch.int64).max, positions).amin(1)
    return torch.stack([last_visible, first_hidden], dim=1).flatten().tolist()


def _check_shapes(reports: list[list[int]]) -> None:
    """ValueError unless all ranks hold as many rows and tokens, and all or none a mask: later messages would hang."""
    for rank, (batch, local, of_mask) in enumerate(reports):
        if [batch, local] != reports[0][:2]:
            raise ValueError(
                f"rank {rank} of the sequence holds {batch} rows of {local} tokens, and rank 0 {reports[0][0]} of "
                f"{reports[0][1]}: all ranks of a sequence must shard the same batch (prepare_dataloader sees to it)"
            )
        if of_mask != reports[0][2]:
            raise ValueError("some ranks of the sequence were given an attention_mask and some none: give all, or none")


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
