"""Ranks of our own: started, joined by gloo or NCCL, watched, and ended. A rank that fails ends them all."""

import contextlib
import logging
import multiprocessing as mp
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 2.0  # between the first failure and the end of all ranks, so that the cause can be heard

# (plan, rank, device, progress) -> a result that torch.save takes
Job = Callable[[Any, int, torch.device, Callable[[], None]], Any]


class RankError(RuntimeError):
    """A rank died, failed or fell silent; the message has its traceback."""


def prepare_ranks(model_module: str, device_type: str) -> Any:
    """The multiprocessing context of `run_ranks`. On a CPU the imports start here, once for all ranks."""
    if device_type != "cpu" or "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")  # CUDA does not survive a fork
    from multiprocessing import forkserver

    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["easyctx.check.steps", "easyctx.check.launch", model_module])
    forkserver.ensure_running()
    return context


def run_ranks(
    context: Any,
    job: Job,
    plan: Any,
    *,
    world_size: int,
    device_type: str,
    timeout: float,
    on_progress: Callable[[], None],
    setup: Callable[[], None] | None = None,
) -> list[Any]:
    """Run `job` on `world_size` ranks of this machine; the ranks' results in order.

    Args:
        context: from `prepare_ranks`.
        job: a module-level function; it, `plan` and `setup` are pickled.
        timeout: seconds without a word from any rank until all are taken for hung.
        on_progress: called whenever rank 0 says that it got on.
        setup: called first on every rank.

    Raises:
        RankError: a rank died, raised, or all were silent for too long. No process is left behind.
        ValueError: easyctx itself refused, on a rank, what it was asked for.
    """
    with tempfile.TemporaryDirectory(prefix="easyctx_check_") as folder:
        ranks = _Ranks(world_size)
        try:
            for rank in range(world_size):
                ranks.start(context, (job, plan, setup, rank, world_size, device_type, folder, timeout))
            ranks.go()
            ranks.watch(timeout, on_progress)
        finally:
            ranks.end()
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(world_size)]


class _Ranks:
    """The processes, and what was heard of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[Any] = []
        self.pipes: dict[Connection, int] = {}
        self.done: set[int] = set()
        self.failures: list[tuple[int, str, str]] = []  # (rank, kind, text), in the order of their arrival

    def start(self, context: Any, arguments: tuple[Any, ...]) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self.pipes[ours] = len(self.processes)
        process.start()
        theirs.close()
        self.processes.append(process)

    def go(self) -> None:
        """Let the ranks join, now that all of them were started: none waits for one that never comes."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it died already, as `watch` will find
                pipe.send("go")

    def watch(self, timeout: float, on_progress: Callable[[], None]) -> None:
        """Until all ranks are done, or one is known to fail."""
        deadline = time.monotonic() + timeout
        while len(self.done) < self.world_size and self.pipes:
            heard = wait(list(self.pipes), max(deadline - time.monotonic(), 0))
            if not heard and not self.failures:
                silent = sorted(set(range(self.world_size)) - self.done)
                raise RankError(f"ranks {silent} gave no sign of life for {timeout:g} s (--timeout)")
            if not heard:
                break
            for pipe in heard:
                assert isinstance(pipe, Connection)
                if self._hear(pipe, on_progress) and not self.failures:
                    deadline = time.monotonic() + timeout
            if self.failures:  # who else fails, and why?
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if self.failures:
            self._raise()

    def _hear(self, pipe: Connection, on_progress: Callable[[], None]) -> bool:
        """Take one message; whether it was a sign of life."""
        rank = self.pipes[pipe]
        try:
            kind, text = pipe.recv()
        except (EOFError, OSError):  # the process is gone
            del self.pipes[pipe]
            if rank not in self.done and rank not in {r for r, *_ in self.failures}:
                self.processes[rank].join(GRACE_SECONDS)
                self.failures.append((rank, "died", f"exit code {self.processes[rank].exitcode}"))
            return False
        if kind == "progress":
            on_progress()
        elif kind == "done":
            self.done.add(rank)
        else:
            self.failures.append((rank, kind, text))
        return kind in ("progress", "done")

    def _raise(self) -> None:
        """One error out of what failed. The first is the cause: ranks fail when a neighbour is gone."""
        rank, kind, text = self.failures[0]
        if kind == "refused":
            raise ValueError(text)
        message = f"rank {rank} of {self.world_size} {kind}: {text}"
        for rank, kind, text in self.failures[1:]:
            message += f"\nthen rank {rank} {kind}: {text.strip().splitlines()[-1]}"
        raise RankError(message)

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive() and len(self.done) < self.world_size:
                process.kill()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.pipes:
            pipe.close()


def _serve(
    pipe: Any,
    job: Job,
    plan: Any,
    setup: Callable[[], None] | None,
    rank: int,
    world_size: int,
    device_type: str,
    folder: str,
    timeout: float,
) -> None:
    """A rank's whole life."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.recv()
        device = _join(rank, world_size, device_type, folder, timeout)
        if setup is not None:
            setup()
        result = job(plan, rank, device, lambda: pipe.send(("progress", "")) if rank == 0 else None)
        torch.save(result, Path(folder) / f"{rank}.pt")
        from easyctx.mesh import leave_processes

        leave_processes()
        pipe.send(("done", ""))
    except BaseException as error:
        with contextlib.suppress(OSError):  # nobody listens any more
            pipe.send(("refused", str(error)) if _is_refusal(error) else ("raised", "\n" + traceback.format_exc()))


def _end_with_parent() -> None:
    """No rank outlives the check, not even one that was killed."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _join(rank: int, world_size: int, device_type: str, folder: str, timeout: float) -> torch.device:
    import torch.distributed as dist
    import transformers

    # What a launcher would have set, for code that asks.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    logging.getLogger("easyctx").setLevel(logging.ERROR)  # the report says which kernel ran
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # once a rank, they would bury the report
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    return device


def _is_refusal(error: BaseException) -> bool:
    """Whether easyctx raised this ValueError, as its answer to what the user asked for."""
    if not isinstance(error, ValueError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return PACKAGE in Path(last).resolve().parents
