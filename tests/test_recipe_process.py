"""The commands of a recipe as processes: which Python runs them, and how they are ended."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from easyctx.recipe.commands import Command
from easyctx.recipe.process import Interrupted, run_process


def test_a_signal_reaches_the_training_and_its_end_is_awaited(tmp_path):
    """As under a launcher, the training process is the command's child; the launcher itself hears nothing."""
    train = (
        "import signal, sys, time, pathlib\n"
        "def stop(number, _):\n"
        "    pathlib.Path(sys.argv[2]).write_text(str(number)); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[2] + '.ready').touch(); time.sleep(60)\n"
    )
    launch = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    said = tmp_path / "said"

    def interrupt() -> None:
        while not Path(f"{said}.ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        run_process([sys.executable, "-c", launch, train, "easyctx.train", str(said)])
    assert stopped.value.number == signal.SIGTERM
    assert said.read_text() == str(int(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_process([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_commands_run_with_this_python():
    assert Command(["easyctx", "data", "x"]).argv == [sys.executable, "-m", "easyctx.cli", "data", "x"]
    assert Command(["python", "-m", "x"]).argv == [sys.executable, "-m", "x"]
