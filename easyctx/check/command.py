"""`easyctx check`: prove on your own architecture that sharded training equals one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

EXIT_OVER_TOLERANCE = 1
EXIT_RANK_FAILED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `easyctx check`."""
    parser.description = (
        "Build your model's architecture small (fewer layers and narrow, but its own heads, windows, sinks and RoPE),"
        " train it a few SGD steps in one process and on SP x DP processes of this machine, and compare losses and"
        " every parameter's gradient. No weights are loaded and no GPU is needed."
    )
    parser.epilog = (
        "Exit status: 0 exact within tolerance, 1 over tolerance, 2 bad input or something that easyctx refuses to"
        " compute, 3 a process failed."
    )

    def flag(name: str, help: str, **kwargs: Any) -> None:
        names = {f"--{name}", f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}"}
        parser.add_argument(*sorted(names), dest=name.replace("-", "_"), help=help, **kwargs)

    flag("model", "folder or file of a config.json, hub name, or family such as llama", required=True)
    flag("parallel_mode", "how attention is spread", required=True, metavar="MODE")
    flag("sp", "processes that share one sequence", type=int, required=True, metavar="N")
    flag("dp", "data-parallel groups of them (default: 1)", type=int, default=1, metavar="N")
    flag("ring_degree", "ring part of --sp, for modes that have two parts", type=int, metavar="N")
    flag("layers", "layers to keep (default: 2; at least one of each kind)", type=int, default=2, metavar="N")
    flag(
        "seq-length",
        "tokens to a sequence (default: a prime that outgrows windows up to 512)",
        type=int,
        metavar="N",
    )
    flag("packed", "cut rows into documents; the one process runs each alone", action="store_true")
    flag(
        "dtype",
        "float64 (default; to 1e-10), float32 (1e-5), bfloat16 or float16 (1.25 times one device's own error)",
        default="float64",
    )
    flag("steps", "SGD steps (default: 2)", type=int, default=2, metavar="N")
    flag("accumulate", "micro-batches to a step (default: 2)", type=int, default=2, metavar="N")
    flag("attn-kernel", "attention kernel, as in training (default: auto)", default="auto", metavar="NAME")
    flag(
        "device",
        "cpu, cuda, or auto (default): GPUs where there are enough and the dtype has a kernel there",
        choices=("auto", "cpu", "cuda"),
        default="auto",
    )
    flag("json", "also write the whole result to this file", metavar="FILE")
    flag("seed", "of weights and data (default: 0)", type=int, default=0, metavar="N")
    flag("tolerance", "largest relative error; in half precision, multiple of one device's", type=float, metavar="X")
    flag("timeout", "seconds of silence until the processes are given up (default: 600)", type=float, default=600.0)


def run(args: argparse.Namespace) -> int:
    """Check and report; raises `ValueError` for a user's mistake and for what easyctx refuses."""
    from dataclasses import fields

    from easyctx.check.settings import CheckSettings

    return check_and_report(CheckSettings(**{f.name: getattr(args, f.name) for f in fields(CheckSettings)}))


def check_and_report(settings: Any, setup: Callable[[], None] | None = None) -> int:
    """Print the table of a `CheckSettings`, write its JSON, and return the exit status.

    Args:
        setup: a module-level function that every rank calls first.

    Raises:
        ValueError: bad settings, or something that easyctx refuses; the JSON then says so too.
    """
    from pathlib import Path

    from easyctx.check.launch import RankError
    from easyctx.check.report import describe, outcome, refusal_json, result_json
    from easyctx.check.run import check, prepare, quiet
    from easyctx.check.settings import check_settings
    from easyctx.evals.results import write_json

    check_settings(settings)
    try:
        with quiet():
            subject = prepare(settings)
            print("\n".join(describe(subject)), flush=True)
            result = check(subject, setup)
    except ValueError as error:
        if settings.json is not None:
            write_json(Path(settings.json), refusal_json(vars(settings), str(error)))
        raise
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_RANK_FAILED
    print("\n".join(outcome(result)), flush=True)
    if settings.json is not None:
        write_json(Path(settings.json), result_json(result))
    return 0 if result.holds else EXIT_OVER_TOLERANCE
