"""The recipe proven on real text: a model trained short becomes a long one, with controls.

    python -m train_scripts.proof --books NOVELS/ --held-out OTHER_NOVELS/ [--minutes 9] [--processes 2]

Runs, in order and several at once: texts, tokenizer and start model, `easyctx data`, rows with recall tasks,
`easyctx recipe`, eval/needle.py, eval/perplexity.py and eval/longchat.py of every stage, then the controls. The same
command goes on where it stopped, also on another machine that got the output folder (train_scripts/proof/pack.py).
`python benchmarks/proof.py` makes results and figures of it.

Exit status: 0 all is done, 3 the time was up, 1 something failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from train_scripts.proof import recipes
from train_scripts.proof.graph import MAIN, proof_tasks
from train_scripts.proof.runner import Task, run_tasks

TIME_IS_UP = 3


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_scripts.proof", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("train_scripts/proof/proof.yaml"))
    parser.add_argument("--books", type=Path, required=True, help="folder of novels (.txt, .txt.gz) to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of others, for the evals")
    parser.add_argument("--long-text", type=Path, help="one unwrapped .txt for perplexity (default: all held out)")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many; the same command goes on")
    parser.add_argument("--jobs", type=int, default=4, help="commands at a time (default: %(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="of the training, one a GPU: short stages are data parallel, the extension a zigzag ring. Of evals "
        "and controls, each has one of these GPUs",
    )
    parser.add_argument("--parity", action="store_true", help="also the extension's first steps in 1 and 2 processes")
    parser.add_argument("--parity-steps", type=int, default=12)
    parser.add_argument("--parity-length", type=int, help="tokens of its sequences (default: the second stage's)")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="run these alone, as far as what they need is there")
    parser.add_argument("--without", nargs="+", metavar="TASK", default=[], help="leave these out, and what needs them")
    sizes = parser.add_argument_group("start model")
    sizes.add_argument("--vocabulary", type=int, default=4096)
    sizes.add_argument("--hidden", type=int, default=384)
    sizes.add_argument("--layers", type=int, default=6)
    sizes.add_argument("--head-dim", type=int, default=64)
    sizes.add_argument("--rope-theta", type=float, default=1e4, help="its RoPE base")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--most-tokens", type=int, default=100_000_000, help="in the rows of a stage; then they repeat")
    rows.add_argument("--row-processes", type=int, default=6, help="that make the rows of one stage")
    rows.add_argument(
        "--text-to-answers", type=float, help="learnt tokens of text for one of an answer, in the longest rows"
    )
    evals = parser.add_argument_group("evals")
    evals.add_argument(
        "--samples", type=int, default=2, help="needles for each length and depth; of the last model twice"
    )
    evals.add_argument("--records", type=int, default=10, help="LongChat records of each size")
    evals.add_argument("--questions", type=int, default=5, help="on each of them")
    return parser


def prepare(args: argparse.Namespace) -> recipes.Content:
    """Checks what was given, and the recipe. Raises ValueError."""
    for name in ("books", "held_out"):
        if not getattr(args, name).is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is no folder")
    content = recipes.main_recipe(recipes.load(args.recipe), args.processes)
    short, longer = recipes.split(content)
    args.cpu = short[0]["engine"] == "cpu"
    first, last = short[-1]["seq_length"], longer[-1]["seq_length"]
    args.lengths = [first << doubled for doubled in range(64) if first << doubled <= last]
    args.parity_length = args.parity_length or longer[0]["seq_length"]
    return content


def chosen(tasks: list[Task], only: list[str] | None, without: list[str]) -> list[Task]:
    """Those that are named, or all; ValueError for a name that is none."""
    names = [task.name for task in tasks]
    for flag, given in (("--only", only or []), ("--without", without)):
        if unknown := [name for name in given if name not in names]:
            raise ValueError(f"{flag} {unknown[0]} is no task; the tasks are {', '.join(names)}")
    return [task for task in tasks if (only is None or task.name in only) and task.name not in without]


def check_gpus(args: argparse.Namespace, tasks: list[Task]) -> None:
    """ValueError where tasks are to be spread over GPUs that are not there: evals would run on the CPU."""
    there = torch.cuda.device_count()
    if args.processes > max(there, 1) and not args.cpu and any(task.gpus for task in tasks):
        raise ValueError(
            f"--processes is {args.processes}, one a GPU, and there are {there}: lower it, or have --only name tasks "
            "that need none"
        )


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        content = prepare(args)
        tasks = chosen(proof_tasks(args, content), args.only, args.without)
        check_gpus(args, tasks)
    except ValueError as error:
        parser.error(str(error))
    out = Path(content["output"])
    recipes.write(content, out / recipes.FOLDER / f"{MAIN}.yaml")
    failed, left = run_tasks(tasks, out, args.jobs, 60 * args.minutes, 0 if args.cpu else args.processes)
    print(f"proof: {len(tasks) - len(left)} of {len(tasks)} tasks are done in {out}; left: {', '.join(left) or 'none'}")
    return 1 if failed else TIME_IS_UP if left else 0


if __name__ == "__main__":
    sys.exit(main())
