"""Saving a run while it goes on, and going on with a saved one."""

import json
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException

from easyctx.mesh import Mesh
from easyctx.training import checkpoint_files as files
from easyctx.training.checkpoint_checks import check_room, check_shared, read_trainer, run_facts
from easyctx.training.config import TrainConfig
from easyctx.training.progress import Progress, TrainingStopped
from easyctx.training.random_state import random_state, set_random_state
from easyctx.training.ranks import Ranks
from easyctx.training.state import TrainingState, training_state


class Checkpoints:
    """The checkpoints of one run. All ranks must make the same calls.

    A checkpoint is copied to host memory while training waits, and written by a thread while it goes on; with
    `--sync-save` it is written while training waits, and no copy is made. A checkpoint that cannot be written is
    reported, and the one before it stays.
    """

    def __init__(self, config: TrainConfig, state: TrainingState, mesh: Mesh, rows: Any, ranks: Ranks) -> None:
        self.config, self.state, self.ranks = config, state, ranks
        self.root = Path(config.output_dir) / files.CHECKPOINTS
        self.run = run_facts(config, rows) | {"processes": ranks.size, "mesh": str(mesh)}
        self.saved_step: int | None = None
        self.seconds_waited = 0.0
        if ranks.size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="easyctx-checkpoint")
        self._writing: Future[bool] | None = None
        self._is_written = True

    def restore(self, checkpoint: Path | None) -> Progress:
        """Set weights, optimizer and random numbers to a checkpoint's; where the run stands, 0 without one."""
        if self.ranks.rank == 0 and self.root.is_dir():
            files.remove_partial(self.root)
        if checkpoint is None:
            return Progress()
        is_own = checkpoint.resolve().parent == self.root.resolve()
        if is_own and self.ranks.rank == 0:
            for path in files.set_aside_later(checkpoint):
                print(f"easyctx: this run goes on from {checkpoint.name}, so a later one is now {path}", flush=True)
        self.state.restore(checkpoint / files.STATE, self.ranks)
        random_file = checkpoint / _random_name(self.ranks.rank)
        if random_file.exists():  # a run on more ranks keeps the new ones' own seeds
            set_random_state(torch.load(random_file, weights_only=True))
        progress = Progress(**read_trainer(checkpoint)["progress"])
        self.saved_step = progress.step if is_own else None
        return progress

    def save_if_due(self, progress: Progress) -> None:
        every = self.config.save_every
        if every and progress.step % every == 0 and progress.step < self.config.max_train_steps:
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Begin to write a checkpoint of the run as it is now; returns when training may go on."""
        begin = time.perf_counter()
        self.finish()
        parts = self.state.parts(copied=not self.config.sync_save)
        trainer = json.dumps({"progress": progress.as_dict(), **self.run}, indent=1) + "\n"
        given = (progress.step, parts, random_state(), trainer)
        if self.config.sync_save:  # not in the thread, which has no GPU of its own to copy from
            self._is_written = self._write(*given)
        else:
            self._writing = self._thread.submit(self._write, *given)
        self.saved_step = progress.step
        self.seconds_waited += time.perf_counter() - begin

    def save_at_stop(self, progress: Progress, signal_name: str) -> None:
        """Save unless that was just done, and say how to go on.

        Raises:
            TrainingStopped: the checkpoint could not be written.
        """
        if self.saved_step != progress.step:
            self.save(progress)
        if not self.finish():
            raise TrainingStopped(f"stopped by {signal_name} after step {progress.step}, which could not be saved")
        if self.ranks.rank == 0:
            print(
                f"easyctx: stopped by {signal_name} after step {progress.step} of {self.config.max_train_steps}, saved "
                f"in {files.step_folder(self.root, progress.step)}; --resume goes on with it",
                flush=True,
            )

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written; whether the last one is safely on the disk."""
        if self._writing is not None:
            self._is_written, self._writing = self._writing.result(), None
        return self._is_written

    def close(self) -> None:
        self.finish()
        self._thread.shutdown()

    def _write(self, step: int, parts: dict[str, torch.Tensor], random: dict[str, Any], trainer: str) -> bool:
        final = files.step_folder(self.root, step)
        partial = final.with_name(final.name + files.PARTIAL)
        records: list[dict[str, Any]] = []

        def make_folder() -> None:
            if self.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                files.write_durably(partial / files.TRAINER, trainer)

        def write_parts() -> None:
            writer = dcp.FileSystemWriter(partial / files.STATE, single_file_per_rank=True, sync_files=True)
            alone = self.ranks.size == 1
            dcp.save(parts, storage_writer=writer, process_group=self.ranks.group, no_dist=alone)

        def record_files() -> None:
            torch.save(random, partial / _random_name(self.ranks.rank))
            records.extend(files.file_record(partial, name) for name in self._own_files(partial))

        def publish() -> None:
            if self.ranks.rank == 0:
                files.publish(partial, final, [record for share in all_records for record in share])
                files.prune(self.root, self.config.keep_checkpoints)

        for stage in (make_folder, write_parts, record_files):
            if not self._all_succeed(stage, partial):
                return False
        all_records = self.ranks.gather(records)
        return self._all_succeed(publish, partial)

    def _own_files(self, partial: Path) -> list[str]:
        """The files of a checkpoint that this rank wrote, relative to its folder."""
        own = [_random_name(self.ranks.rank)]
        own += [f"{files.STATE}/{p.name}" for p in (partial / files.STATE).glob(f"__{self.ranks.rank}_*.distcp")]
        if self.ranks.rank == 0:
            own += [files.TRAINER, f"{files.STATE}/.metadata"]
        return sorted(own)

    def _all_succeed(self, stage: Any, partial: Path) -> bool:
        """Run a stage of writing on every rank; False, and a report, if it fails on any."""
        error = None
        try:
            stage()
        except (Exception, CheckpointException) as failure:  # the latter is a bare BaseException
            error = f"rank {self.ranks.rank}: {_cause(failure)}"
        errors = [e for e in self.ranks.gather(error) if e]
        if errors and self.ranks.rank == 0:
            kept = files.step_folders(self.root)
            shutil.rmtree(partial, ignore_errors=True)
            print(
                f"easyctx: WARNING: the checkpoint {partial} could not be written ({'; '.join(errors)}). Training goes "
                f"on; the last good checkpoint is {kept[-1] if kept else 'none'}",
                flush=True,
            )
        return not errors


def _random_name(rank: int) -> str:
    return f"random_{rank:05d}.pt"


def _cause(failure: BaseException) -> str:
    """The first thing that went wrong, on one line; torch wraps it together with every rank's traceback."""
    wrapped = getattr(failure, "failures", None)
    if wrapped:
        failure = next(iter(wrapped.values()))[0]
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"


def make_checkpoints(
    config: TrainConfig, accelerator: Accelerator, model: Any, optimizer: Any, mesh: Mesh, rows: Any
) -> Checkpoints:
    """The checkpoints of a run whose model and optimizer are prepared; TrainingStopped where the disk is too small."""
    ranks = Ranks()
    parameters = list(accelerator.unwrap_model(model).parameters())
    trained, everything = (
        sum(getattr(p, "ds_numel", p.numel()) for p in some)
        for some in ([p for p in parameters if p.requires_grad], parameters)
    )
    check_room(config, trained, trained if config.lora_r else everything, ranks)
    check_shared(config, ranks)
    return Checkpoints(config, training_state(accelerator, model, optimizer, ranks), mesh, rows, ranks)
