"""The train loop's flags as benchmarks/train_step.py takes them."""

import argparse
from typing import Any

from easyctx.engine import launched_processes
from easyctx.training.flags import parse_arguments

FIXED = ["--dataset", "random", "--output-dir", "unused", "--tracker", "none"]
FIXED += ["--gradient-accumulate-every", "1", "--max-grad-norm", "0"]


def step_settings(args: argparse.Namespace, flags: list[str]) -> Any:
    """The train loop's configuration of one step; flags that it does not know end the program with status 2."""
    mode = ["--parallel_mode", "zigzag_ring_attn"] if launched_processes() > 1 else []
    return parse_arguments(["--model", args.model, *FIXED, *mode, *flags])


def shared_flags(flags: list[str]) -> list[str]:
    """Those that hold for every method; others would be refused elsewhere, or change the work."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dtype")
    parser.add_argument("--seed")
    parser.add_argument("--sp-degree", "--sp_degree", dest="sp-degree")
    known, _ = parser.parse_known_args(flags)
    return [text for name, value in vars(known).items() if value is not None for text in (f"--{name}", value)]
