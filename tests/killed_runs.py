"""Runs of the train loop in processes that are killed at random moments, and what is left of them."""

import multiprocessing as mp
import os
import random
import shutil
import socket
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.train_helpers import flags

FIRST_STEP_SECONDS, END_SECONDS = 120.0, 60.0


@dataclass
class KilledRun:
    """One run of `steps` steps in `processes` processes, a checkpoint each `save_every`, killed and started again."""

    inputs: Path
    output: Path
    steps: int
    save_every: int
    processes: int = 1
    seconds: tuple[float, float] = (0.0, 1.0)  # between its first step and its end
    settings: dict[str, Any] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    losses: dict[int, set[str]] = field(default_factory=dict)

    def whole(self) -> tuple[dict[int, str], dict[str, torch.Tensor]]:
        """Losses and weights of the same run without kills."""
        twin = replace(self, output=self.output.with_name("whole"), save_every=0, counts=Counter(), losses={})
        shutil.rmtree(twin.output, ignore_errors=True)
        assert twin.live(None)
        losses = {step: next(iter(seen)) for step, seen in twin.losses.items()}
        return losses, load_file(twin.output / "model.safetensors")

    def live(self, dice: random.Random | None) -> bool:
        """Start, or go on, and kill one process at a random moment; whether the run came to its end instead."""
        before = self.newest_checkpoint()
        log = self.output.with_name(f"{self.output.name}.log")
        log.write_text("")
        started = self._start(log)
        if dice is not None:
            self._wait_for_first_step(log, started)
            time.sleep(dice.uniform(*self.seconds))
            dice.choice(started).kill()
        for process in started:
            process.join(END_SECONDS if dice else None)
            assert process.exitcode is not None, f"a process still runs {END_SECONDS} s after another was killed"
        finished = all(process.exitcode == 0 for process in started)
        assert finished or dice is not None, "a run that nobody killed failed"
        self._look_back(log, before, finished)
        return finished

    def newest_checkpoint(self) -> int:
        steps = [int(p.name[5:]) for p in (self.output / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
        return max(steps, default=0)

    def _start(self, log: Path) -> list[Any]:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["easyctx.train", "tests.models"])
        settings = {"max_train_steps": self.steps, "save_every": self.save_every, "resume": True} | self.settings
        command = flags(self.inputs, self.output, **settings)
        port = _free_port()
        started = []
        for rank in range(self.processes):
            process = context.Process(target=_train, args=(command, log, rank, self.processes, port), daemon=True)
            process.start()
            started.append(process)
        return started

    def _wait_for_first_step(self, log: Path, started: list[Any]) -> None:
        end = time.monotonic() + FIRST_STEP_SECONDS
        while not log.read_text() and all(process.is_alive() for process in started):
            assert time.monotonic() < end, "no step was taken"
            time.sleep(0.01)

    def _look_back(self, log: Path, before: int, finished: bool) -> None:
        lines = [line.split() for line in log.read_text().splitlines() if line.endswith(".")]
        steps = [int(step) for step, _, _ in lines]
        for step, loss, _ in lines:
            self.losses.setdefault(int(step), set()).add(loss)
        assert steps == list(range(before + 1, before + 1 + len(steps))), f"went on after {before} with {steps[:1]}"
        self.counts["steps"] += len(steps)
        if finished:
            return
        last, kept = before + len(steps), self.newest_checkpoint()
        lost = last - kept
        # A checkpoint is begun when the one before it is on the disk.
        begun = (last - 1) // self.save_every * self.save_every
        assert kept >= max(before, begun - self.save_every), f"{kept} kept, {begun} begun, {before} before"
        self.counts["kills"] += 1
        self.counts["steps_lost"] += lost
        self.counts["most_steps_lost"] = max(self.counts["most_steps_lost"], lost)
        self.counts["while_writing"] += bool(list((self.output / "checkpoints").glob("*.partial")))


def _train(command: list[str], log: Path, rank: int, world: int, port: int) -> None:
    """One process of a run, which writes down each step and its loss, bit for bit."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    from easyctx import train
    from easyctx.training.report import Reporter

    original = Reporter.step

    def step(reporter: Reporter, loss: float, grad_norm: float, rate: float) -> None:
        original(reporter, loss, grad_norm, rate)
        if rank == 0:
            with log.open("a") as file:
                file.write(f"{reporter.progress.step} {loss.hex()} .\n")

    Reporter.step = step  # type: ignore[method-assign]
    status = train.main(command)
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
