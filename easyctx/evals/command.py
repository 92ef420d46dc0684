"""`easyctx eval NAME ...`: an eval, or their report, from an installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# Name -> (module, one line of help). Each module has `main(argv) -> exit status`, and runs by `-m` too.
EVALS = {
    "needle": ("easyctx.evals.needle", "a number that one sentence of a long text hides"),
    "perplexity": ("easyctx.evals.perplexity", "perplexity by length"),
    "longchat": ("easyctx.evals.tasks.longchat", "topics and lines of long records"),
    "narrativeqa": ("easyctx.evals.tasks.narrativeqa", "questions on whole books"),
    "ruler": ("easyctx.evals.tasks.ruler", "13 tasks and the effective length"),
    "elo": ("easyctx.evals.elo", "models compared in pairs by a judge"),
    "report": ("easyctx.evals.report", "one HTML page of all results"),
}


def started_as(name: str) -> str:
    """What was typed to start this eval, for the first line of its help and of its errors."""
    script = Path(sys.argv[0])
    if script.name in ("easyctx", "easyctx.exe") or script.parts[-2:] == ("easyctx", "__main__.py"):
        return f"easyctx eval {name}"
    if script.is_file() and script.resolve().is_relative_to(Path(__file__).parent):
        return f"python -m {EVALS[name][0]}"
    return f"{name}.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `easyctx eval`: everything after NAME is the eval's own."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(f"  {name:<12} {help_line}" for name, (_, help_line) in EVALS.items())
    parser.description = "Run an eval; `easyctx eval NAME --help` lists its flags.\n\n" + listed
    modules = "\n".join(f"  accelerate launch … -m {module} …" for module, _ in list(EVALS.values())[:3])
    parser.epilog = f"On several processes, start the eval's module:\n{modules}"
    parser.add_argument("name", choices=list(EVALS), metavar="NAME", help=", ".join(EVALS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the eval")


def run(args: argparse.Namespace) -> int:
    status: int = importlib.import_module(EVALS[args.name][0]).main(args.arguments)
    return status
