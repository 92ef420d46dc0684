"""One method of benchmarks/train_step.py in a process of its own on each rank: the process, and who looks after it.

A method that runs out of memory, hangs or crashes takes its own processes down and nothing else; their memory is free
again for the next one, and engines that cannot live in one process can be compared in one launch.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

FAILURE = "failure.json"  # in the folder that a rank's parent and child share
GRACE = 20.0  # seconds in which the other ranks' processes may fail by themselves, after one did
Row = dict[str, Any]


def fail(folder: Path, length: int, error: BaseException) -> None:
    """Leave word of what ended this rank's child."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()) or type(error).__name__
    message = text if text.startswith("easyctx") else f"{type(error).__name__}: {text}"
    (folder / FAILURE).write_text(json.dumps({"seq_length": length, "message": message[:1500]}))


def end_with_parent() -> None:
    """Have this child killed when its parent is gone, so that it holds no GPU behind it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Ranks:
    """The parents of all ranks, which agree on where the children meet and on how each ended."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        store: dist.Store = dist.HashStore()
        if self.size > 1:
            store, *_ = next(iter(dist.rendezvous("env://")))
        self.store = dist.PrefixStore("train_step", store)

    def run(self, name: str, command: list[str], folder: Path, timeout: float) -> Row | None:
        """Run a method's children to their end; None, or the length and message of what failed on any rank."""
        (folder / FAILURE).unlink(missing_ok=True)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.rank == 0:  # it lives as long as the children, and its port is nobody else's from now on
            meeting = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.store.set(f"{name} port", str(meeting.port))
        port = self.store.get(f"{name} port").decode()
        # "Agent": the store is there already, none of the children is to open it.
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        settings = os.environ | {"MASTER_ADDR": host, "MASTER_PORT": port} | agent
        child = subprocess.Popen(command, env=settings)
        try:
            self._watch(name, child, folder, time.monotonic() + timeout, timeout)
        finally:
            child.kill()
            child.wait()
        self.store.add(f"{name} ended", 1)
        while self.store.add(f"{name} ended", 0) < self.size:
            time.sleep(0.1)
        return json.loads(self.store.get(f"{name} failed")) if self.store.check([f"{name} failed"]) else None

    def _watch(self, name: str, child: subprocess.Popen[bytes], folder: Path, deadline: float, timeout: float) -> None:
        """Until the child ended, or a while after another rank's failed."""
        key, seen = f"{name} failed", None
        while child.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if self.store.check([key]):
                seen = seen or now
                if now > seen + GRACE:
                    return
            elif now > deadline:
                self._report(key, {"seq_length": None, "message": f"not done after {timeout:g} s"})
        if child.returncode:
            self._report(key, _failure(folder, child.returncode))

    def _report(self, key: str, failure: Row) -> None:
        if not self.store.check([key]):  # the first one is the cause
            self.store.set(key, json.dumps(failure))


def _failure(folder: Path, status: int) -> Row:
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / FAILURE).read_text())
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    hint = " (out of host memory?)" if status == -signal.SIGKILL else ""
    return {"seq_length": None, "message": f"its process ended: {ended}{hint}"}
