"""Sharding a batch over the ranks that share it, and putting results back in order."""

from typing import Any

import torch
import torch.distributed as dist

from easyctx.documents import Documents
from easyctx.layout import Layout
from easyctx.mesh import Mesh, num_processes
from easyctx.modes import check_mode, get_mode, make_mode_mesh
from easyctx.positions import note_batch

IGNORE_INDEX = -100


def shift_labels(labels: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
    """Targets `[B, S]`: what each token is to predict, the label of the next one; -100 after the last.

    To be done before sharding: a shard does not hold the token that follows its last one. With documents, the last
    token of each has no target either: what follows belongs to another text.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if documents is not None:
        documents.check_fits(*labels.shape)
        for row, starts in enumerate(documents.starts):
            rows = row if len(documents.starts) > 1 else slice(None)
            targets[rows, [start - 1 for start in starts[1:]]] = IGNORE_INDEX
    return targets


def prepare_seq_parallel_inputs(
    seq_algo: str,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
    rank: int,
    world_size: int,
    device: torch.device | str,
    *,
    documents: Documents | None = None,
    ring_degree: int | None = None,
    pad_token_id: int = 0,
) -> dict[str, Any]:
    """This rank's shard of a batch, on `device`.

    Args:
        seq_algo: a mode of `easyctx.modes.MODES`.
        input_ids: int64 `[B, S]`, the whole sequences; the same on all ranks of a sequence-parallel group.
        position_ids: `[B, S]` or `[1, S]`; None for 0 .. S - 1, or for each document's own with `documents`.
            Positions that begin again at 0 are document borders too: the patched model finds them.
        target_ids: `[B, S]`, already shifted (`shift_labels`), -100 where there is no loss; or None.
        rank, world_size: this rank's place in its sequence-parallel group, and the group's size.
        documents: where documents begin in each row, for rows that hold several.
        ring_degree: of `usp_attn`, as given to `make_mesh`.
        pad_token_id: fills lengths that do not divide; padding follows the sequence and has no target, so it
            changes neither loss nor gradients. It repeats the last position, or is a document of its own.

    Returns:
        `local_input_ids`, `local_position_ids`, `local_target_ids` (None without targets), each `[B, S'/P]` with S'
        the padded length. With `documents` also `documents`, of the padded rows, to be given to the model:
        `model(…, documents=…)`. With data_parallel the whole batch, whose borders a stock model finds in the
        position ids.
    """
    mode = get_mode(seq_algo)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give whole sequences as [batch, tokens]")
    batch, length = input_ids.shape
    if documents is not None:
        documents.check_fits(batch, length)
    position_ids = _whole_positions(position_ids, documents, input_ids)
    for name, tensor in (("position_ids", position_ids), ("target_ids", target_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}")
    whole = {"input_ids": input_ids, "position_ids": position_ids, "target_ids": target_ids}
    if not mode.is_sequence_parallel:
        return {f"local_{name}": t if t is None else t.to(device) for name, t in whole.items()}
    check_mode(seq_algo, world_size, world_size, ring_degree)
    layout = mode.shard_layout(world_size, ring_degree)
    missing = -length % layout.multiple(world_size)
    is_packed = documents is not None or bool((position_ids.diff(dim=1) < 0).any())
    last = position_ids[:, -1:].cpu()
    padding = {
        "input_ids": torch.full((batch, missing), pad_token_id),
        "position_ids": torch.arange(missing).expand(batch, -1) if is_packed else last.expand(-1, missing),
        "target_ids": torch.full((batch, missing), IGNORE_INDEX),
    }
    local: dict[str, Any] = {}
    for name, tensor in whole.items():
        if tensor is not None:
            tensor = torch.cat([tensor, padding[name].to(tensor)], dim=1) if missing else tensor
            tensor = layout.shard(tensor, world_size, rank).to(device)
        local[f"local_{name}"] = tensor
    note_batch(local["local_input_ids"], input_ids)
    return local | ({} if documents is None else {"documents": documents.padded(length + missing)})


def _whole_positions(
    position_ids: torch.Tensor | None, documents: Documents | None, input_ids: torch.Tensor
) -> torch.Tensor:
    if position_ids is None and documents is not None:
        position_ids = documents.position_ids().to(input_ids.device)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return position_ids.expand(input_ids.shape[0], -1)


def prepare_dataloader(seq_algo: str, dataloader: Any, accelerator: Any, mesh: Mesh | None = None) -> Any:
    """The data loader for this process: drawn by data-parallel rank, the same for all ranks of a sequence.

    Shuffles follow one seed, rank 0's, whatever the other processes were seeded with.

    Args:
        dataloader: a torch DataLoader over whole sequences; its batch size is per data-parallel rank.
        accelerator: an `accelerate.Accelerator`.
        mesh: from `make_mesh`; default: all processes share each sequence (data_parallel: each has its own).
    """
    from accelerate.data_loader import prepare_data_loader

    if mesh is None:
        mesh = make_mode_mesh(seq_algo)
    return prepare_data_loader(
        dataloader,
        device=accelerator.device,
        num_processes=mesh.dp_size,
        process_index=mesh.dp_rank,
        put_on_device=False,
        use_seedable_sampler=True,
        data_seed=_common_seed(dataloader, accelerator.device),
    )


def _common_seed(dataloader: Any, device: torch.device | str) -> int:
    """The seed of rank 0's shuffle, on every rank."""
    generator = getattr(dataloader.sampler, "generator", None)
    own = torch.initial_seed() if generator is None else generator.initial_seed()
    seed = torch.tensor(own % 2**63, device=device)  # a seed has 64 bits without a sign, an int64 has 63
    if num_processes() > 1:
        dist.broadcast(seed, src=0)
    return int(seed)


def is_real_token(
    seq_algo: str,
    length: int,
    rank: int,
    world_size: int,
    ring_degree: int | None = None,
    *,
    row_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool `[S'/P]`: which of this rank's tokens belong to the `length` ones, rather than to their padding.

    For what counts tokens, as the auxiliary loss of mixtures of experts does (`easyctx.moe`). Arguments as given to
    `prepare_seq_parallel_inputs`; with `row_lengths`, int64 `[B]`, of rows padded to `length`: bool `[B, S'/P]`.
    """
    mode = get_mode(seq_algo)
    positions = torch.arange(length)
    if mode.is_sequence_parallel:
        layout = mode.shard_layout(world_size, ring_degree)
        positions = layout.positions(length + -length % layout.multiple(world_size), world_size, rank)
    return positions < (length if row_lengths is None else row_lengths[:, None])


def gather_sequence(
    seq_algo: str, local: torch.Tensor, mesh: Mesh, length: int, dim: int = 1, *, differentiable: bool = False
) -> torch.Tensor:
    """All ranks' shards put back in global order and cut to `length`, on every rank.

    Args:
        local: this rank's `[B, S'/P, …]` (tokens along `dim`), as computed from `prepare_seq_parallel_inputs`.
        length: S, the length before padding.
        differentiable: let gradients through, each rank taking those of its own tokens. All ranks are then to
            compute the same loss from the result, and an engine that averages gradients over P ranks divides that
            loss by P: multiply it by P.
    """
    mode = get_mode(seq_algo)
    if not mode.is_sequence_parallel:
        return local
    layout = mode.shard_layout(mesh.sp_size, mesh.ring_degree)
    local = local if differentiable else local.detach()
    return _Gather.apply(local, mesh, layout, dim % local.dim()).narrow(dim, 0, length)


class _Gather(torch.autograd.Function):
    """All shards in global order; its adjoint, where every rank computes the same, is to take one's own shard."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, mesh: Mesh, layout: Layout, dim: int) -> torch.Tensor:
        ctx.mesh, ctx.layout, ctx.dim = mesh, layout, dim
        local = local.contiguous()
        shards = [torch.empty_like(local) for _ in range(mesh.sp_size)]
        dist.all_gather(shards, local, group=mesh.sp_group)
        return layout.unshard(shards, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.layout.shard(grads[0], ctx.mesh.sp_size, ctx.mesh.sp_rank, dim=ctx.dim), None, None, None
