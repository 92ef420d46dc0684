"""A way to train that benchmarks/train_step.py times: a random model under the launch's engine, and a step on it."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from easyctx.engine import engine_name, make_accelerator
from easyctx.memory.budget import GIB
from easyctx.modes import make_mode_mesh
from easyctx.train import train_step
from easyctx.training.memory import budget_now, explained_out_of_memory
from easyctx.training.model import weight_dtype
from easyctx.training.optimizer import make_optimizer, set_learning_rate
from step_parts.models import model_config
from step_parts.settings import step_settings

Row = dict[str, Any]


class Method:
    """A model under an engine, on this rank. Weights never change, so every step of every method is the same step."""

    mode: str | None = None  # of the run that the user asked for, unless a method has its own

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        self.config = step_settings(args, flags)
        self.accelerator = make_accelerator(max_grad_norm=0.0)
        self.num_processes, self.device = self.accelerator.num_processes, self.accelerator.device
        mode = self.mode or self.config.parallel_mode
        if self.num_processes == 1:
            mode = "data_parallel"
        self.config.parallel_mode = mode
        self.mesh = make_mode_mesh(mode, self.config.sp_degree, self.config.ring_degree)
        self.hf_config = model_config(args.model, args.layers, max(args.seq_lengths))
        self.check()
        # As at the start, for every length: later ones find memory that is theirs to use again.
        budget = budget_now(self.config, self.device)
        self.config.gpu_memory, self.config.host_memory = budget.gpu / GIB, budget.host / GIB
        self.inner = self.make_model(self.to_build(args))
        optimizer = make_optimizer(self.inner, self.config)
        self.model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        # Adam does all its work, and its step is nothing.
        set_learning_rate(self.optimizer, 0.0)
        self.model.train()

    def make_model(self, hf_config: LlamaConfig) -> Any:
        torch.manual_seed(self.config.seed)
        with self.device:
            return AutoModelForCausalLM.from_config(hf_config, dtype=weight_dtype(self.config.dtype, self.accelerator))

    @property
    def label(self) -> str:
        """In rows."""
        raise NotImplementedError

    @property
    def under(self) -> str:
        """The engine, in rows."""
        return engine_name(self.accelerator)

    @property
    def sequences(self) -> int:
        """Of a step, over all ranks."""
        return self.mesh.dp_size

    @property
    def data_rank(self) -> int:
        """Which of these sequences is this rank's."""
        return self.mesh.dp_rank

    def check(self) -> None:
        """Raises ValueError for what is missing here, before there is a model."""

    def to_build(self, args: argparse.Namespace) -> LlamaConfig:
        """The model that is made; raises ValueError as `check`."""
        return self.hf_config

    def arrange(self, length: int) -> Row:
        """Make ready for steps of this length; what a row should say of it.

        Raises ValueError for a length that this method cannot do.
        """
        raise NotImplementedError

    def as_whole(self, row: Row, length: int) -> Row:
        """A measured row, as one of the whole model."""
        return row

    def region(self) -> AbstractContextManager[Any]:
        """Held open around a step."""
        return nullcontext()

    def step(self, ids: torch.Tensor) -> tuple[float, float | None]:
        """One step on whole sequences `[1, S]`: the mean loss and the gradient norm."""
        batches = iter([{"input_ids": ids}])
        with explained_out_of_memory(self.model), self.region():
            return train_step(
                self.model, self.optimizer, batches, self.config, self.hf_config, self.accelerator, self.mesh
            )
