"""Kills runs of the train loop at random moments (`kill -9`), starts them again, and looks for what was lost.

    python benchmarks/kill_resume.py [--kills 200] [--processes 1 2] [--save-every 3] [--seed 0]

A tiny float32 model on the CPU. Every life of a run must go on with the step after its newest checkpoint; the losses of
all lives and the last weights must equal, bit for bit, those of a run that nobody killed. With several processes one of
them is killed, and the others must end by themselves.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from shared_parts.results_file import print_table, write_results
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' tiny model and killed runs

from tests.killed_runs import KilledRun
from tests.train_helpers import make_inputs


def kill_runs(inputs: Path, folder: Path, processes: int, kills: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row: so many kills, over as many runs as that takes."""
    settings = dict(steps=args.steps, save_every=args.save_every, processes=processes, seconds=(0.0, args.seconds))
    row: dict[str, Any] = dict(processes=processes, save_every=args.save_every, kills=0, runs=0, steps=0, steps_lost=0)
    row |= dict(most_steps_lost=0, while_writing=0, losses_that_differ=0, weights_that_differ=0)
    folder.mkdir()
    losses, weights = KilledRun(inputs, folder / "run0", **settings).whole()
    dice, begin = random.Random(args.seed + processes), time.monotonic()
    with tqdm(total=kills, desc=f"{processes} processes") as bar:
        while row["kills"] < kills and time.monotonic() - begin < args.minutes * 60:
            row["runs"] += 1
            run = KilledRun(inputs, folder / f"run{row['runs']}", **settings)
            while not run.live(dice if row["kills"] + run.counts["kills"] < kills else None):
                bar.update()
            for name in ("kills", "steps", "steps_lost", "while_writing"):
                row[name] += run.counts[name]
            row["most_steps_lost"] = max(row["most_steps_lost"], run.counts["most_steps_lost"])
            row["losses_that_differ"] += sum(run.losses[step] != {loss} for step, loss in losses.items())
            found = load_file(run.output / "model.safetensors")
            row["weights_that_differ"] += sum(not torch.equal(tensor, weights[name]) for name, tensor in found.items())
    return row | {"seconds": round(time.monotonic() - begin)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="shared by the numbers of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="a life's longest, from its first step on")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no other run after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder))
        share = args.kills // len(args.processes)
        rows = [kill_runs(inputs, Path(folder) / f"{n}", n, share, args) for n in args.processes]
    path = write_results("kill_resume", rows, args.output)
    print_table(rows)
    print(path)


if __name__ == "__main__":
    main()
