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
from easyctx.training.progress import Progress, TrainingStopped

LONGEST_BEAT = 2.0  # seconds
BEATS_TO_COMPARE = 3
BEATS_OF_PATIENCE = 3  # for an error that a rank may come to tell itself
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
        store: Any = dist.distributed_c10d._get_default_store() if self.size > 1 else None
        self._store = store and store.clone()
        self._beat = 0
        self._main = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="easyctx-heartbeat")

    def __enter__(self) -> "Heartbeat":
        if self.timeout:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._done.set()
        if self.timeout:
            self._thread.join()
        alone = isinstance(error, Exception) and not isinstance(error, TrainingStopped)  # which all ranks raise
        if alone and self.size > 1:
            try:
                self._tell_failure(f"{type(error).__name__}: {error}")
            except (RuntimeError, OSError) as gone:  # must not hide the error itself
                self._say(f"rank 0 or the launcher is gone, which kept the run's store ({gone})")

    def _tell_failure(self, error: str) -> None:
        """Tell the others, which wait for this rank, why it does not come; then name those that it may have missed."""
        if self._failure():
            return
        what = f"rank {self.rank} failed in step {self.progress.step + 1}: {error}"
        self._say(what)
        self._store.set(f"{self._prefix}/failed", what)
        if self.timeout and (silent := self._silent(self._later_signs())):
            self._say(f"it may be because {silent}")

    def _watch(self) -> None:
        before, since = None, time.monotonic()
        while not self._done.wait(self.interval):
            try:
                stack = self._publish()
                if (self.progress.step, stack) != before:
                    before, since = (self.progress.step, stack), time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    report = self._report()
                    if (self.progress.step, self._stack()) == before:
                        self._give_up(f"no headway for {self.timeout:g} s: {report}")
                if failure := self._failure():
                    self._give_up(failure, BEATS_OF_PATIENCE)
            except (RuntimeError, OSError) as error:
                self._give_up(
                    f"rank 0 or the launcher is gone, which kept the run's store ({error})", BEATS_OF_PATIENCE
                )

    def _give_up(self, why: str, patience: int = 0) -> None:
        """End this process, unless its main thread ends by itself within `patience` beats."""
        if self._done.wait(patience * self.interval):
            return
        self._say(f"{why}; rank {self.rank} ends in step {self.progress.step + 1} (--hang-timeout {self.timeout:g})")
        time.sleep(BEATS_TO_COMPARE * self.interval)  # the others may still be comparing
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

    def _publish(self) -> tuple[tuple[str, int, str], ...]:
        """Tell all ranks where this one stands; returns the stack that was seen."""
        stack = self._stack()
        self._beat += 1
        if self._store is not None:
            sign = Sign(self._beat, self.progress.step + 1, _place(stack), _waits(stack))
            self._store.set(f"{self._prefix}/{self.rank}", json.dumps(asdict(sign)))
        return stack

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

    def _later_signs(self) -> dict[int, tuple[Sign, bool]]:
        """The ranks' signs of a few beats from now, and whether each has told anything in the meantime."""
        before = self._signs()
        for _ in range(BEATS_TO_COMPARE if self.size > 1 else 0):
            time.sleep(self.interval)
            self._publish()
        return {
            rank: (sign, rank == self.rank or rank not in before or sign.beat > before[rank].beat)
            for rank, sign in self._signs().items()
        }

    def _silent(self, signs: dict[int, tuple[Sign, bool]]) -> str:
        never = [f"rank {rank} never took a step" for rank in range(self.size) if rank not in signs]
        silent = [
            f"rank {rank} gives no sign of life, last seen in step {sign.step}"
            for rank, (sign, alive) in signs.items()
            if not alive
        ]
        return "; ".join(never + silent)

    def _report(self) -> str:
        """The ranks that hold the others up, and where; all ranks where none stands out."""
        signs = self._later_signs()
        silent = self._silent(signs)
        busy = {rank: sign for rank, (sign, alive) in signs.items() if alive and not sign.waits}
        shown = busy or ({} if silent else {rank: sign for rank, (sign, _) in signs.items()})
        return "; ".join([*([silent] if silent else []), *(f"rank {rank}: {sign}" for rank, sign in shown.items())])


def _place(stack: tuple[tuple[str, int, str], ...]) -> str:
    """Where a program stands: its innermost line, and the innermost of easyctx."""
    ours = next((frame for frame in stack if "easyctx/" in frame[0]), None)
    places = dict.fromkeys(frame for frame in (stack[0], ours) if frame is not None) if stack else {}
    return ", called by ".join(f"{_short(file)}:{line} {name}" for file, line, name in places) or "nowhere"


def _short(file: str) -> str:
    return file.rsplit("site-packages/", 1)[-1] if "site-packages/" in file else "/".join(file.split("/")[-3:])


def _waits(stack: tuple[tuple[str, int, str], ...]) -> bool:
    return any(part in file for file, _, _ in stack for part in WAITING)
