"""Pools of spawned gloo ranks that stay up for the whole test session: a job costs milliseconds, not a launch."""

import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable, Iterable
from typing import Any

TIMEOUT_SECONDS = 120


def fork_server() -> Any:
    """The context whose processes have the imports of a rank as they start: it is they that take the time."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "easyctx.train", "tests.models"])
    return context


class RankPool:
    """`world_size` processes joined by gloo. `run` calls one module-level function on every rank."""

    def __init__(self, world_size: int) -> None:
        context = fork_server()
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="easyctx_store_")
        store = f"{self._folder.name}/store"
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, store), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """`job(rank, world_size, *args)` on all ranks; their results in rank order.

        Raises AssertionError with the traceback of the first rank that failed.
        """
        return self.answers_of(range(self.world_size), job, *args)

    def answers_of(self, ranks: Iterable[int], job: Callable[..., Any], *args: Any) -> list[Any]:
        """The same, where only these ranks are expected to answer: the others may die of the job."""
        for pipe in self._pipes:
            pipe.send((job, args))
        answers = []
        for rank, pipe in [(rank, self._pipes[rank]) for rank in ranks]:
            if not pipe.poll(TIMEOUT_SECONDS):
                self.close()
                raise AssertionError(f"rank {rank} of {self.world_size} gave no answer in {TIMEOUT_SECONDS} s")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{trace}" for rank, (_, trace) in enumerate(answers) if trace]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for result, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()


def _serve(pipe: Any, rank: int, world_size: int, store: str) -> None:
    import os

    import torch
    import torch.distributed as dist

    # What a launcher would have set, for accelerate.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        job, args = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((job(rank, world_size, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
