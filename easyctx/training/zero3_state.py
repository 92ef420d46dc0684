"""The state of a DeepSpeed ZeRO-3 run, by parameter name (see `easyctx/training/state.py`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from easyctx.training.ranks import Ranks
from easyctx.training.state import WEIGHT, saved_kinds


class Zero3State:
    """Parameters and Adam's moments that DeepSpeed keeps in flat partitions, in float32 for the optimizer.

    They are gathered one at a time, and each rank keeps a share of them for writing; reading goes the other way. That
    sends every value once over the network, and makes the checkpoint independent of the partitions.
    """

    def __init__(self, parameters: dict[str, Any], engine: Any, ranks: Ranks) -> None:
        if engine.zero_optimization_stage() != 3:
            raise ValueError(
                f"checkpoints under DeepSpeed need ZeRO stage 3, and the accelerate configuration says "
                f"{engine.zero_optimization_stage()}: set zero_stage: 3, or take ddp.yaml or fsdp2.yaml"
            )
        self.parameters, self.zero, self.ranks = parameters, engine.optimizer, ranks
        self.device = engine.device  # where messages are sent from, also with everything offloaded

    def parts(self, *, copied: bool) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        mine: dict[str, torch.Tensor] = {}
        for index, (name, p) in enumerate(self.parameters.items()):
            state = self._state_of(p)
            for key in (WEIGHT, *state):
                if key == "step":
                    whole = torch.as_tensor(state[key], dtype=torch.float32)
                elif key == WEIGHT:
                    whole = safe_get_full_fp32_param(p)
                else:
                    whole = safe_get_full_optimizer_state(p, key)
                if index % self.ranks.size == self.ranks.rank:
                    mine[f"{key}/{name}"] = whole.detach().to("cpu", copy=True)
        return mine

    def restore(self, folder: Path, ranks: Ranks) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        reader = dcp.FileSystemReader(folder)
        kinds = saved_kinds(reader, self.parameters)
        mine = self._read_share(reader, kinds, ranks)
        self._make_moments(next(iter(kinds.values())))
        for owner, name, p in self._owned():
            for key in (WEIGHT, *kinds[name]):
                shape = () if key == "step" else tuple(p.ds_shape)
                whole = self._from_owner(mine.get(f"{key}/{name}"), owner, shape)
                if key == "step":
                    self._set_step(p, float(whole))
                elif key == WEIGHT:
                    safe_set_local_fp32_param(p, self._own_partition(p, whole))
                    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                        p.data.copy_(whole)
                else:
                    safe_set_local_optimizer_state(p, self._own_partition(p, whole), key)

    def _owned(self) -> Iterator[tuple[int, str, Any]]:
        for index, (name, p) in enumerate(self.parameters.items()):
            yield index % self.ranks.size, name, p

    def _read_share(self, reader: Any, kinds: dict[str, dict[str, Any]], ranks: Ranks) -> dict[str, torch.Tensor]:
        """This rank's share of the checkpoint, on the CPU, so that the files are read once by all ranks together."""
        mine: dict[str, torch.Tensor] = {}
        for owner, name, p in self._owned():
            if owner == ranks.rank:
                mine[f"{WEIGHT}/{name}"] = torch.empty(p.ds_shape)
                for key, meta in kinds[name].items():
                    mine[f"{key}/{name}"] = torch.empty(meta.size)
        dcp.load(mine, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
        return mine

    def _from_owner(self, whole: torch.Tensor | None, owner: int, shape: tuple[int, ...]) -> torch.Tensor:
        sent = torch.empty(shape, device=self.device) if whole is None else whole.to(self.device)
        if self.ranks.size > 1:
            dist.broadcast(sent, src=owner)
        return sent

    def _own_partition(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, which DeepSpeed pads to a multiple of the ranks."""
        size = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.ranks.size - whole.numel()))
        return padded.narrow(0, size * self.ranks.rank, size)

    def _flat(self, parameter: Any) -> torch.Tensor:
        """The flat float32 partition that holds this parameter, which is what DeepSpeed's inner optimizer steps."""
        group, _, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group]

    def _state_of(self, parameter: Any) -> dict[str, Any]:
        return self.zero.optimizer.state.get(self._flat(parameter), {})

    def _make_moments(self, kinds: dict[str, Any]) -> None:
        """Give the inner optimizer the state that it would make at its first step."""
        for flat in self.zero.fp32_partitioned_groups_flat:
            self.zero.optimizer.state[flat] = {
                key: 0 if key == "step" else torch.zeros_like(flat.data, dtype=torch.float32) for key in kinds
            }

    def _set_step(self, parameter: Any, step: float) -> None:
        """PyTorch's AdamW counts in a tensor, DeepSpeed's in an integer."""
        counts_in_tensor = isinstance(self.zero.optimizer, torch.optim.Adam | torch.optim.AdamW)
        self._state_of(parameter)["step"] = torch.tensor(step) if counts_in_tensor else int(step)
