"""Runs commands whose results are files, in an order that their needs allow, until a time limit.

A task is done when the file that it makes is there; the same call again does what is left, on this or another machine.
Where there are several GPUs, each task is given those that it needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyctx.environment import hardware
from easyctx.evals.results import append_rows

POLL_SECONDS = 0.2
STOP_SECONDS = 30.0  # after SIGTERM, which the train loop answers with a checkpoint
TIMES, LOGS = "times.jsonl", "logs"
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Task:
    """`command` may look into what is needed: it is called when the task starts. Earlier tasks go first.

    gpus: how many it computes on; 0 for what runs on the CPU.
    """

    name: str
    makes: Path
    needs: tuple[Path, ...]
    command: Callable[[], list[str]]
    gpus: int = 0


@dataclass
class Running:
    task: Task
    process: subprocess.Popen[bytes]
    since: float
    gpus: tuple[int, ...] = ()


def run_tasks(tasks: list[Task], folder: Path, jobs: int, seconds: float, gpus: int = 0) -> tuple[list[str], list[str]]:
    """(names of those that failed, names of those that are not done), after `seconds` or when nothing more can run.

    At most `jobs` run at once. Each has a log in `folder`, where times.jsonl says how long it took. Of several `gpus`,
    each sees its own alone.
    """
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    running: list[Running] = []
    failed: list[str] = []
    started: set[str] = set()
    try:
        while time.monotonic() - begun < seconds:
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                _finished(each, folder, failed, begun)
            # A file that is there may not be whole while its task still runs.
            unsure = {each.task.makes for each in running}
            ready = [task for task in tasks if task.name not in started and _is_ready(task, unsure)]
            for task in ready:
                placed = place(task, [each.gpus for each in running], gpus)
                if len(running) < jobs and placed is not None:
                    started.add(task.name)
                    running.append(_start(task, folder, begun, placed))
            if not running:
                break
            time.sleep(POLL_SECONDS)
        else:
            _say(begun, f"the time is up; stopping {', '.join(each.task.name for each in running)}")
    finally:
        _stop(running)
    return failed, [task.name for task in tasks if not task.makes.exists()]


def _is_ready(task: Task, unsure: set[Path]) -> bool:
    return not task.makes.exists() and all(path.exists() and path not in unsure for path in task.needs)


def place(task: Task, taken: list[tuple[int, ...]], gpus: int) -> tuple[int, ...] | None:
    """The GPUs that a task gets, of 0 .. gpus - 1: those with the fewest commands on them; None where it has to wait.

    Commands share a GPU, as small ones leave it idle most of the time. But one over several GPUs goes at the pace of
    the busiest: beside it, a GPU has one other command at most, and that is none over several.

    Args:
        taken: of each running command.
    """
    if gpus < 2:
        return ()
    load = [sum(gpu in each for each in taken) for gpu in range(gpus)]
    chosen = tuple(sorted(sorted(range(gpus), key=lambda gpu: load[gpu])[: task.gpus]))
    is_shared = any(len(each) > 1 for each in taken)
    if is_shared and (len(chosen) > 1 or any(load[gpu] > 1 for gpu in chosen)):
        return None
    return chosen


def _start(task: Task, folder: Path, begun: float, gpus: tuple[int, ...]) -> Running:
    command = task.command()
    where = f" on GPU {', '.join(map(str, gpus))}" if gpus else ""
    _say(begun, f"{task.name}{where}: {' '.join(command)}")
    with (folder / LOGS / f"{task.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(gpus))
    return Running(task, process, time.monotonic(), gpus)


def _environment(gpus: tuple[int, ...]) -> dict[str, str]:
    """For a command that shall see these GPUs alone, of those that are visible here; () leaves all visible."""
    if not gpus:
        return dict(os.environ)
    names = os.environ[VISIBLE].split(",") if os.environ.get(VISIBLE) else None
    return {**os.environ, VISIBLE: ",".join(names[gpu] if names else str(gpu) for gpu in gpus)}


def _finished(each: Running, folder: Path, failed: list[str], begun: float) -> None:
    name, status = each.task.name, each.process.returncode
    seconds = round(time.monotonic() - each.since, 1)
    machine = hardware(len(each.gpus) or None)
    append_rows(folder / TIMES, [{"task": name, "seconds": seconds, "status": status, "hardware": machine}])
    if status == 0 and each.task.makes.exists():
        _say(begun, f"{name}: done in {seconds:.0f} s")
        return
    failed.append(name)
    log = folder / LOGS / f"{name}.log"
    tail = log.read_text(errors="replace")[-1500:]
    _say(begun, f"{name}: failed with exit status {status} after {seconds:.0f} s; the end of {log}:\n{tail}")


def _stop(running: list[Running]) -> None:
    for each in running:
        each.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for each in running:
        try:
            each.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()


def read_times(folder: Path) -> list[dict[str, Any]]:
    """A row for each run of a task: task, seconds, exit status, hardware."""
    path = folder / TIMES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _say(begun: float, text: str) -> None:
    print(f"[{time.monotonic() - begun:5.0f} s] {text}", flush=True)
