"""A run whose ranks wait for one that died or hangs ends in bounded time, and says which rank that is and where."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch.distributed as dist

from easyctx.mesh import num_processes
from easyctx.training.progress import Progress

LONGEST_BEAT = 5.0  # seconds
LAST_WORDS = 3 * LONGEST_BEAT  # for the failed rank's own error to come out first
WAITING = ("torch/distributed/", "easyctx/transport.py", "easyctx/loss.py", "easyctx/training/ranks.py")
_runs = count()


@dataclass
class Sign:
    """What a rank last told: how often it has told anything, its step, where its program stands, whether it waits."""

    beat: int
    step: int
    where: str
    waits: bool

    def __str__(self) -> str:
        return f"step {self.step}, {'waiting for others' if self.waits else 'not waiting for others'} in {self.where}"


class Heartbeat:
    """A thread on each rank that looks, while it is entered, whether the main thread makes headway.

    Headway is another step, or the program standing elsewhere than a beat ago. Without any for `timeout` seconds the
    rank compares what all ranks told through the launcher's store, names those that do not wait or give no sign of
    life, and ends its process; launchers then end the others. An error on one rank ends the others likewise.

    Args:
        progress: of the run.
        timeout: seconds without headway; 0 for no watch at all.
        leave: ends the process.
    """

    def __init__(self, progress: Progress, timeout: float, leave: Callable[[int], Any] = os._exit) -> None:
        self.progress, self.timeout, self.leave = progress, timeout, leave
        self.size = num_processes()
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.interval = min(LONGEST_BEAT, timeout / 4)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"easyctx/heartbeat/{attempt}/{next(_runs)}"
        # A connection of its own: another thread may wait in the first one.
        self._store: Any = dist.distributed_c10d._get_default_store() if self.size > 1 else None
        self._store = self._store and self._store.clone()
        self._main = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="easyctx-heartbeat")

    def __enter__(self) -> "Heartbeat":
        if self.timeout:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._done.set()
        if isinstance(error, Exception) and self.size > 1:
            # The others wait for this rank, and are told why it does not come.
            what = f"rank {self.rank} failed in step {self.progress.step + 1}: {type(error).__name__}: {error}"
            self._say(what)
            if self._store is not None and not self._failure():
                self._store.set(f"{self._prefix}/failed", what)
        if self.timeout:
            self._thread.join()

    def _watch(self) -> None:
        before, since, beat = None, time.monotonic(), 0
        while not self._done.wait(self.interval):
            try:
                stack = self._stack()
                beat += 1
                self._publish(Sign(beat, self.progress.step + 1, _place(stack), _waits(stack)))
                if (self.progress.step, stack) != before:
                    before, since = (self.progress.step, stack), time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    self._give_up(f"no headway for {self.timeout:g} s: {self._report()}")
                if failure := self._failure():
                    self._give_up(failure, LAST_WORDS)
            except (RuntimeError, OSError) as error:
                self._give_up(f"rank 0 or the launcher is gone, which kept the run's store ({error})", LAST_WORDS)

    def _give_up(self, why: str, patience: float = 0.0) -> None:
        """End this process, unless its main thread ends by itself within `patience` seconds."""
        if self._done.wait(patience):
            return
        self._say(f"{why}; rank {self.rank} ends in step {self.progress.step + 1} (--hang-timeout {self.timeout:g})")
        self.leave(1)

    def _say(self, text: str) -> None:
        print(f"easyctx: ERROR: {text}", file=sys.stderr, flush=True)

    def _stack(self) -> tuple[tuple[str, int, str], ...]:
        """File, line and function of every frame of the main thread, innermost first."""
        frame = sys._current_frames().get(self._main)
        found = []
        while frame is not None:
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return tuple(found)

    def _publish(self, sign: Sign) -> None:
        if self._store is not None:
            self._store.set(f"{self._prefix}/{self.rank}", json.dumps(asdict(sign)))

    def _failure(self) -> str:
        key = f"{self._prefix}/failed"
        if self._store is None or not self._store.check([key]):
            return ""
        return bytes(self._store.get(key)).decode()

    def _signs(self) -> dict[int, Sign]:
        """What each rank told last; the ranks that never told anything are missing."""
        if self._store is None:
            stack = self._stack()
            return {0: Sign(0, self.progress.step + 1, _place(stack), _waits(stack))}
        keys = {rank: f"{self._prefix}/{rank}" for rank in range(self.size)}
        told = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        return {rank: Sign(**json.loads(text)) for rank, text in told.items()}

    def _report(self) -> str:
        """The ranks that hold the others up, and where; all ranks where none stands out."""
        before = self._signs()
        if self.size > 1:
            time.sleep(2.5 * self.interval)
        now = self._signs()
        alive = [rank for rank in now if rank == self.rank or now[rank].beat > before.get(rank, now[rank]).beat]
        silent = [rank for rank in range(self.size) if rank not in alive]
        lines = [f"rank {rank} gives no sign of life, last in {now.get(rank, 'no step')}" for rank in silent]
        busy = [rank for rank in alive if not now[rank].waits]
        shown = busy or ([] if silent else alive)
        return "; ".join([*lines, *(f"rank {rank}: {now[rank]}" for rank in shown)])


def _place(stack: tuple[tuple[str, int, str], ...]) -> str:
    """Where a program stands: its innermost line, and the innermost of easyctx."""
    ours = next((frame for frame in stack if "easyctx/" in frame[0]), None)
    places = dict.fromkeys(frame for frame in (stack[0], ours) if frame is not None) if stack else {}
    return ", called by ".join(f"{_short(file)}:{line} {name}" for file, line, name in places) or "nowhere"


def _short(file: str) -> str:
    return file.rsplit("site-packages/", 1)[-1] if "site-packages/" in file else "/".join(file.split("/")[-3:])


def _waits(stack: tuple[tuple[str, int, str], ...]) -> bool:
    return any(part in file for file, _, _ in stack for part in WAITING)
