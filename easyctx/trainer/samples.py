"""Samples by data-parallel rank: drawn so, counted so, and gathered so after evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader

from easyctx.loss import num_targets
from easyctx.mesh import Mesh
from easyctx.positions import number_batch
from easyctx.trainer.batch import read_batch


def deal_by_sequence(accelerator: Accelerator, mesh: Mesh) -> None:
    """Have `accelerator.prepare` give the ranks of one sequence the same samples and other ranks other ones."""

    def prepare(data_loader: Any, device_placement: bool | None = None, **_: Any) -> Any:
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return data_loader
        prepared = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=mesh.dp_size,
            process_index=mesh.dp_rank,
            put_on_device=accelerator.device_placement if device_placement is None else device_placement,
            rng_types=list(accelerator.rng_types or ()),
            dispatch_batches=False,  # the default for streams: rank 0 reads, and deals out to all processes
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    accelerator.prepare_data_loader = prepare  # type: ignore[method-assign]


def count_targets(batches: Sequence[Mapping[str, Any]], mesh: Mesh, device: torch.device) -> torch.Tensor:
    """How many tokens of these batches have a loss, over all data-parallel ranks; at least 1.

    All processes must call it. Raises ValueError, on all of them, where ranks of one sequence hold different samples.
    """
    number, print_of_all = 0, 0
    for batch in batches:
        whole = read_batch(batch)
        if whole.targets is None:
            raise ValueError("the batch has no labels: have the collator or the dataset give them")
        number += num_targets(whole.targets)
        print_of_all = (print_of_all * 1_000_003 + number_batch(whole.input_ids)) % 2**62
    report = torch.tensor([number, print_of_all], device=device)
    reports = [torch.empty_like(report) for _ in range(mesh.sp_size * mesh.dp_size)]
    dist.all_gather(reports, report)
    by_sequence = torch.stack(reports).view(mesh.dp_size, mesh.sp_size, 2)  # neighbouring ranks share a sequence
    if bool((by_sequence != by_sequence[:, :1]).any()):
        raise ValueError(
            f"the {mesh.sp_size} ranks that share a sequence drew different samples: make the dataset, its order and "
            "the collator the same on all processes (no random choices seeded by rank)"
        )
    return by_sequence[:, 0, 0].sum().clamp(min=1)


def gather_samples(accelerator: Accelerator, mesh: Mesh, local: torch.Tensor) -> torch.Tensor:
    """`[n, …]` of each data-parallel rank, put together in the order of the samples.

    Without those that were drawn twice so that all ranks have as many, as `Accelerator.gather_for_metrics` does.
    """
    gathered = local
    if mesh.dp_size > 1:
        parts = [torch.empty_like(local) for _ in range(mesh.dp_size)]
        dist.all_gather(parts, local.contiguous(), group=mesh.dp.group)
        gathered = torch.cat(parts)
    state = accelerator.gradient_state
    return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered


def sum_over_sequence(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The sum over the ranks that share a sequence."""
    dist.all_reduce(values, group=mesh.sp_group)
    return values
