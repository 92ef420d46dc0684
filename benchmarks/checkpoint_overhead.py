"""What checkpoints cost a run on a miniature: the time that training waits for them, and the process's time of the CPU.

    python benchmarks/checkpoint_overhead.py [--save-every 50] [--steps 101] [--repeats 3]

One process; a byte-level Llama of 0.4M parameters at 2,048 tokens a step on the CPU, as the quickstart trains it, from
the end of the first step to that of the last. CPU seconds are of all threads, the one that writes included; they are
compared with those of runs without checkpoints, in turns, as can be done on a machine that others use.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shared_parts.results_file import print_table, write_results
from tqdm import tqdm

from easyctx import train
from easyctx.training.checkpoint import Checkpoints
from easyctx.training.report import Reporter

MODEL = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
LENGTH, ROWS = 2048, 16


def make_inputs(folder: Path) -> None:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL, max_position_embeddings=LENGTH)).save_pretrained(folder / "model")
    ids = torch.randint(0, MODEL["vocab_size"], (ROWS, LENGTH))
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder / "data")


def time_steps(folder: Path, name: str, steps: int, *extra: str) -> tuple[float, float]:
    """CPU seconds a step, and the part of the elapsed time in which training waited for checkpoints."""
    ends: list[tuple[float, float]] = []
    made: list[Checkpoints] = []
    step, init = Reporter.step, Checkpoints.__init__

    def note_step(reporter: Reporter, *args: Any) -> None:
        step(reporter, *args)
        ends.append((time.perf_counter(), time.process_time()))

    def note_made(checkpoints: Checkpoints, *args: Any) -> None:
        init(checkpoints, *args)
        made.append(checkpoints)

    Reporter.step, Checkpoints.__init__ = note_step, note_made  # type: ignore[method-assign]
    command = ["--model", str(folder / "model"), "--dataset", str(folder / "data"), "--output-dir", str(folder / name)]
    command += ["--seq-length", str(LENGTH), "--max-train-steps", str(steps), "--gradient-accumulate-every", "1"]
    try:
        assert train.main([*command, "--tracker", "none", "--overwrite", *extra]) == 0
    finally:
        Reporter.step, Checkpoints.__init__ = step, init  # type: ignore[method-assign]
    elapsed, worked = (end - begin for begin, end in zip(ends[0], ends[-1], strict=True))
    return worked / (steps - 1), made[0].seconds_waited / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=101)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    kinds: dict[str, list[str]] = {"without": []}
    kinds["asynchronous"] = ["--save-every", str(args.save_every)]
    kinds["synchronous"] = [*kinds["asynchronous"], "--sync-save"]
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for _ in tqdm(range(args.repeats), file=sys.stdout):
            for kind, extra in kinds.items():
                found[kind].append(time_steps(Path(folder), kind, args.steps, *extra))
    without = statistics.median(seconds for seconds, _ in found["without"])
    rows = []
    for kind, pairs in found.items():
        seconds = statistics.median(seconds for seconds, _ in pairs)
        row = {"checkpoints": kind, "save_every": args.save_every, "steps": args.steps, "repeats": args.repeats}
        row |= {"cpu_seconds_a_step": seconds, "of_each": [seconds for seconds, _ in pairs]}
        row |= {"more_cpu_seconds": seconds / without - 1}
        rows.append(row | {"share_waited": statistics.median(share for _, share in pairs)})
    path = write_results("checkpoint_overhead", rows, args.output)
    print_table(rows)
    print(path)


if __name__ == "__main__":
    main()
