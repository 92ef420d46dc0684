"""`accelerate launch` in which the tests' fork server starts the ranks: its own parsing and environment, no imports.

What takes the time of a launch is that the launcher and each rank import torch, transformers and accelerate anew. Real
launches of every kind are left: test_train.py (DeepSpeed), test_recipe.py and test_lora_scripts.py (gloo).
"""

import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.pool import fork_server
from tests.train_helpers import ROOT, accelerate

TIMEOUT_SECONDS = 400


def forked_launch(config: str, arguments: list[str], *extra: str) -> str:
    """What all ranks of `accelerate launch --config_file accelerate_configs/CONFIG … -m easyctx.train` say.

    Raises AssertionError with it where one ends with another status than 0.
    """
    from accelerate.commands import launch

    command = accelerate(config, arguments, *extra)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("torch.distributed.run.run", lambda args: said.append(_run_ranks(args)))
        launch.launch_command(launch.launch_command_parser().parse_args(command[command.index("--config_file") :]))
    [text] = said
    return text


def _run_ranks(args: Any) -> str:
    """In the place of torchrun, whose arguments and environment are given."""
    assert (args.module, args.training_script) == (True, "easyctx.train")
    world = int(args.nproc_per_node)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    with tempfile.TemporaryDirectory(prefix="easyctx_launch_") as folder:
        logs = [Path(folder) / f"{rank}.txt" for rank in range(world)]
        ranks = [
            fork_server().Process(
                target=_train, args=(environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)), log, args)
            )
            for rank, log in enumerate(logs)
        ]
        statuses = _statuses(ranks)
        text = "".join(log.read_text() for log in logs if log.exists())
    assert statuses == [0] * world, f"exit statuses {statuses}\n{text[-9000:]}"
    return text


def _statuses(ranks: list[mp.Process]) -> list[int | None]:
    """Of all ranks, when all have ended; the others are killed when one has failed, or after the timeout."""
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()  # those that are still there
        rank.join()
    return [rank.exitcode for rank in ranks]


def _train(environment: dict[str, str], log: Path, args: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [args.training_script, *args.training_script_args]
    from easyctx import train

    try:
        status = train.main(args.training_script_args)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
