"""easyctx's own way to train, for benchmarks/train_step.py: everything as its train loop decides it."""

import argparse

from transformers import LlamaConfig

from easyctx.engine import leave_unpinned
from easyctx.memory.budget import GIB
from easyctx.memory.describe import describe_choices
from easyctx.training.memory import RunMemory, decide_memory
from easyctx.training.model import patch_model
from step_parts.layers_timed import (
    NO_PLAN,
    Ballast,
    as_whole,
    check_room,
    device_here,
    last_layers,
    layers_to_run,
    room_now,
    take_ballast,
)
from step_parts.method import Method, Row
from step_parts.models import model_config


class Own(Method):
    """All layers, or with `--layers-timed` the last ones, and the memory of the others beside them."""

    whole: RunMemory | None = None
    part: RunMemory | None = None  # of `whole`, what runs
    ballast: Ballast | None = None

    @property
    def label(self) -> str:
        return f"easyctx {self.config.parallel_mode}"

    def to_build(self, args: argparse.Namespace) -> LlamaConfig:
        planned = self._planned([args.warmup_length, *args.seq_lengths])
        if not all(memory.decision.pins for memory in planned):
            leave_unpinned(self.accelerator)
        self.layers = self.hf_config.num_hidden_layers
        if args.layers_timed is None:
            return self.hf_config
        if not planned:
            raise ValueError(f"--layers-timed {args.layers_timed}: {NO_PLAN}")
        room = room_now(self.device)
        for memory in planned:
            check_room(memory, room)
        wanted = min(args.layers_timed, self.layers)
        self.layers = layers_to_run([memory.decision for memory in planned], wanted)
        if self.layers > wanted:
            self.accelerator.print(
                f"easyctx: {self.layers} layers are timed in place of --layers-timed {wanted}: the first of "
                "them must keep its input",
                flush=True,
            )
        if self.layers < self.hf_config.num_hidden_layers:
            device_here()
        return model_config(args.model, self.layers, max(args.seq_lengths))

    def _planned(self, lengths: list[int]) -> list[RunMemory]:
        """The decisions for those of the lengths that fit; what is wrong with the others their rows will say.

        Raises ValueError if none fits.
        """
        found, refusal = [], None
        for length in lengths:
            try:
                found.append(self._decide(length))
            except ValueError as error:
                refusal = error
        if refusal and not found:
            raise refusal
        return [memory for memory in found if memory is not None]

    def _decide(self, length: int) -> RunMemory | None:
        self.config.seq_length = length
        return decide_memory(self.config, self.hf_config, self.accelerator, self.mesh)

    def arrange(self, length: int) -> Row:
        self.ballast = None  # that of an earlier length makes room
        self.whole = self.part = self._decide(length)
        left_out = self.hf_config.num_hidden_layers - self.layers
        if self.whole is not None and left_out:
            self.part = last_layers(self.whole, self.inner.config)
            self.ballast = take_ballast(self.whole, self.part, self.device)
        patch_model(self.inner, self.config, self.part, self.accelerator, self.mesh)
        row: Row = {"recompute": "as planned" if self.whole else "nothing"}
        if left_out:
            row |= {"layers_timed": self.layers, "layers_accounted": left_out}
        return row | (self._planned_row(self.whole) if self.whole else {})

    def _planned_row(self, memory: RunMemory) -> Row:
        for line in memory.lines():
            self.accelerator.print(f"easyctx: {line}", flush=True)
        predicted = memory.decision.predicted
        return {
            "predicted_gpu_gib": predicted.gpu_peak / GIB,
            "predicted_host_gib": predicted.host_peak / GIB,
            "moment": predicted.moment,
            "choices": describe_choices(memory.decision.choices),
            "kernel": memory.setting.kernel,
        }

    def as_whole(self, row: Row, length: int) -> Row:
        if self.whole is None or self.part is None:
            return row
        return as_whole(row, self.whole, self.part, length, self.config.parallel_mode)
