"""One command as a process of its own, whose exit status counts, and which hears of SIGTERM, SIGINT and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from types import FrameType

import psutil  # accelerate needs it too

# A terminal that closes (SIGHUP) would not be heard by the command, which has a session of its own.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRAINS = "easyctx.train"


class Interrupted(Exception):
    """A signal ended the command at hand, after it had saved what it could."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_process(argv: list[str]) -> int:
    """Run a command to its end; its exit status, negative where a signal of another's ended it.

    The first signal goes to the training processes, which save and end: a launcher would give them 30 seconds and
    then kill them. A second one goes to the launcher.

    Raises:
        Interrupted: this process was told to stop; the command has ended.
    """
    received: list[int] = []
    child: subprocess.Popen | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        if child is not None:
            _signal(child, number, to_launcher=len(received) > 1)

    # What is ignored, as SIGHUP under nohup, stays so.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        # Out of the terminal's process group: Ctrl-C would reach the launcher twice.
        child = subprocess.Popen(argv, start_new_session=True)
        if received:
            _signal(child, received[0], to_launcher=True)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])
    return status


def _signal(child: subprocess.Popen, number: int, *, to_launcher: bool) -> None:
    number = signal.SIGTERM if number == signal.SIGHUP else number  # the train loop saves at SIGTERM and SIGINT
    training = [] if to_launcher else training_processes(child.pid)
    for process in training:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
    if not training:
        child.send_signal(number)


def training_processes(launcher: int) -> list[psutil.Process]:
    """The processes below a launcher that run the train loop; none while they are being started."""
    try:
        below = psutil.Process(launcher).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in below if _trains(process)]


def _trains(process: psutil.Process) -> bool:
    try:
        return TRAINS in process.cmdline()
    except psutil.Error:
        return False
