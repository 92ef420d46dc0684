"""The `easyctx` console command: `easyctx COMMAND ...`.

Each command is a module with `add_arguments(parser)` and `run(args) -> int` (the exit status). Only the
module of the command that was asked for is imported, so that `easyctx --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from easyctx import __version__
from easyctx.parser import Parser

# Name -> (module, one line of help). A new command is one row.
COMMANDS: dict[str, tuple[str, str]] = {
    "check": ("easyctx.check.command", "prove that sharded training of your architecture equals one process"),
    "data": ("easyctx.data.command", "tokenise text into rows of one length"),
    "plan": ("easyctx.cost.command", "predict the longest sequence, memory and time for a model on your GPUs"),
    "merge": ("easyctx.adapters.merge", "add a LoRA adapter to the weights it was trained beside"),
    "recipe": ("easyctx.recipe.command", "extend a context in stages: train, resume, keep a table"),
    "eval": ("easyctx.evals.command", "needle, perplexity, LongChat, NarrativeQA, RULER, Elo, and a report of them"),
}

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Parser with every command's name and help line, and the arguments of the `chosen` command alone."""
    parser = Parser(prog="easyctx", description="Exact full attention over long contexts.")
    parser.add_argument("--version", action="version", version=f"easyctx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake (`ValueError`, `OSError`) is one `error:` line, not a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    args = build_parser(chosen).parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
