"""What an optimizer step changes, by parameter name, whichever engine holds it.

All engines write and read the same tensors: `weight/NAME`, and `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME` as the
optimizer has them (bitsandbytes: `state1/NAME`, …). So a checkpoint of one engine, on any number of ranks, can be gone
on with under another.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from easyctx.training.ranks import Ranks

WEIGHT = "weight"


class TrainingState(Protocol):
    """Weights and optimizer of a run. All ranks must make the same calls."""

    def parts(self, *, copied: bool) -> dict[str, torch.Tensor]:
        """What this rank is to write, on the CPU if `copied`: then training may go on while it is written."""
        ...

    def restore(self, folder: Path, ranks: Ranks) -> None:
        """Set everything to what `folder` holds, a checkpoint of torch.distributed.checkpoint."""
        ...


def training_state(accelerator: Accelerator, model: Any, optimizer: Any, ranks: Ranks) -> TrainingState:
    """The state of a prepared model and optimizer."""
    parameters = trained_parameters(accelerator.unwrap_model(model))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from easyctx.training.zero3_state import Zero3State

        return Zero3State(parameters, model, ranks)
    return TensorState(parameters, getattr(optimizer, "optimizer", optimizer), ranks)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, shared ones once; frozen ones are those of the start model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class TensorState:
    """Parameters that are whole on every rank (one process, DDP) or DTensors (FSDP2, HSDP), and a torch optimizer."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.parameters, self.optimizer, self.ranks = parameters, optimizer, ranks
        on_gpu = torch.cuda.is_available()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )

    def parts(self, *, copied: bool) -> dict[str, torch.Tensor]:
        everything = {f"{WEIGHT}/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                if torch.is_tensor(value) or key == "step":  # which bitsandbytes counts in an integer
                    everything[f"{key}/{name}"] = torch.as_tensor(value)
        # Of what is whole everywhere each rank writes a share; of DTensors it writes what it holds.
        mine = {
            name: tensor
            for index, (name, tensor) in enumerate(everything.items())
            if isinstance(tensor, DTensor) or index % self.ranks.size == self.ranks.rank
        }
        if not copied:
            return mine
        staged = self.stager.stage(mine)
        assert isinstance(staged, dict)
        return staged

    def restore(self, folder: Path, ranks: Ranks) -> None:
        reader = dcp.FileSystemReader(folder)
        kinds = saved_kinds(reader, self.parameters)
        target: dict[str, torch.Tensor] = {}
        counts_in_integers = make_own_state(self.optimizer)
        for name, p in self.parameters.items():
            target[f"{WEIGHT}/{name}"] = p.detach()
            state = self.optimizer.state[p]
            for key, meta in kinds[name].items():
                if not torch.is_tensor(state.get(key)):
                    state[key] = _empty_like_saved(meta, key, p)
            target |= {f"{key}/{name}": state[key] for key in kinds[name]}
        dcp.load(target, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
        if counts_in_integers:
            for p in self.parameters.values():
                self.optimizer.state[p]["step"] = int(self.optimizer.state[p]["step"])
        for group in self.optimizer.param_groups:
            if group.get("fused") or group.get("capturable"):  # these count their steps beside the parameter
                for p in group["params"]:
                    state = self.optimizer.state.get(p, {})
                    state |= {key: value.to(p.device) for key, value in state.items() if key == "step"}


def make_own_state(optimizer: Any) -> bool:
    """Have an optimizer of bitsandbytes make the state of its first step, which may be paged; whether it is one."""
    if not hasattr(optimizer, "init_state"):
        return False
    for gindex, group in enumerate(optimizer.param_groups):
        for pindex, p in enumerate(group["params"]):
            optimizer.init_state(group, p, gindex, pindex)
    return True


def saved_kinds(reader: dcp.FileSystemReader, parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """For each parameter, what the checkpoint holds of the optimizer's state: kind -> metadata of that tensor.

    Raises:
        ValueError: the checkpoint is of a model with other parameters.
    """
    saved: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    kinds: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    of_others = set()
    for key, meta in saved.items():
        kind, name = key.split("/", 1)
        if name not in kinds:
            of_others.add(name)
        elif kind != WEIGHT:
            kinds[name][kind] = meta
    for name, p in parameters.items():
        meta = saved.get(f"{WEIGHT}/{name}")
        shape = tuple(getattr(p, "ds_shape", p.shape))  # as DeepSpeed calls it where it has cut the tensor up
        if meta is not None and tuple(meta.size) != shape:
            raise ValueError(
                f"the checkpoint {reader.path} is of another model: its {name} has the shape {tuple(meta.size)}, this "
                f"one's {shape}. Give the --model that its run was started with"
            )
    missing = {name for name in parameters if f"{WEIGHT}/{name}" not in saved}
    if missing or of_others:
        example = sorted(missing or of_others)[0]
        raise ValueError(
            f"the checkpoint {reader.path} is of another model: it {'lacks' if missing else 'has beyond this one'} "
            f"{len(missing or of_others)} parameters, such as {example}. Give the --model that its run was started with"
        )
    return kinds


def _empty_like_saved(meta: Any, kind: str, parameter: torch.Tensor) -> torch.Tensor:
    """Where a tensor of the optimizer's state is to be read into: sharded as its parameter, or small and whole."""
    if kind != "step" and meta.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=meta.properties.dtype)
    return torch.zeros(meta.size, dtype=meta.properties.dtype)
