"""LongChat: which topic was discussed as the k-th, and which number stands in a line?

    python eval/longchat.py --task lines --model DIR --lines 200 500 1000 --output DIR
    python eval/longchat.py --task topics --model DIR --data TOPICS.json --topics 5 25 50 --output DIR
    python eval/longchat.py --task lines --score-only PREDICTIONS.jsonl

Lines: right if the last integer of at most 100 generated tokens is the register's. Topics: right if the
topic's name stands in at most 50 generated tokens, both normalised. Every answer is a row of answers.jsonl;
the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from easyctx.evals.charts import score_curves
from easyctx.evals.command import started_as
from easyctx.evals.session import run_main
from easyctx.evals.tasks import longchat_prompts as prompts
from easyctx.evals.tasks.predictions import labels_of
from easyctx.evals.tasks.questions import Group
from easyctx.evals.tasks.report import Rows, View
from easyctx.evals.tasks.runner import Work, add_task_arguments, run_task
from easyctx.evals.tasks.templates import add_template_argument, read_templates
from easyctx.parser import Parser

LINES = [200, 500, 1000, 2000, 4000]
TOPICS = [5, 10, 15, 20, 25]
QUESTIONS = {
    "lines": "the number in one of many lines",
    "topics": "the name of one of many topics",
}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=started_as("longchat"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=sorted(QUESTIONS), help="needed, except for --plot-only")
    parser.add_argument(
        "--data",
        type=Path,
        help="topics: JSON list of TOPIC and CONVERSATION (needed); either task: JSONL of ready prompts "
        "(prompt with expected_number, or with topics)",
    )
    record = parser.add_argument_group("records")
    record.add_argument("--lines", type=int, nargs="+", help=f"lines of a record (default: {_shown(LINES)})")
    record.add_argument("--topics", type=int, nargs="+", help=f"conversations of a record (default: {_shown(TOPICS)})")
    record.add_argument("--samples", type=int, default=20, help="records of each size (default: %(default)s)")
    record.add_argument("--questions", type=int, default=1, help="asked of one record (default: %(default)s)")
    record.add_argument("--position", type=int, help="always ask for this topic (1: as LongChat does; default: drawn)")
    add_template_argument(parser, prompts.TEMPLATES)
    add_task_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> Work:
    """The questions. Raises ValueError for numbers that do not fit together or data that are not there."""
    task = _task(args)
    for name in ("samples", "questions"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; give at least 1")
    templates = read_templates(args.templates, prompts.TEMPLATES)
    used = prompts.LINES if task == "lines" else prompts.TOPICS
    common = {
        "eval": "longchat",
        "task": task,
        "questions": args.questions,
        "position": args.position,
        "templates": {name: templates[name] for name in used},
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest()[:16] if _is_file(args.data) else None,
    }
    settings = prompts.Settings(args.samples, args.questions, args.seed, templates, args.position)
    return Work(common, _lines(args, settings) if task == "lines" else _topics(args, settings))


def _lines(args: argparse.Namespace, settings: prompts.Settings) -> list[Group]:
    if args.data:
        return prompts.read_prompts(args.data, "lines")
    if args.position is not None:
        raise ValueError("--position is for --task topics")
    sizes = sorted(set(args.lines or LINES))
    if sizes[0] < args.questions:
        raise ValueError(f"--lines has {sizes[0]}, fewer than --questions {args.questions}")
    return [prompts.lines_group(size, sample, settings) for size in sizes for sample in range(args.samples)]


def _topics(args: argparse.Namespace, settings: prompts.Settings) -> list[Group]:
    if not args.data:
        raise ValueError("--task topics needs --data, a JSON list of objects with TOPIC and CONVERSATION")
    first = next(iter(prompts.read_records(args.data)), (None, {"TOPIC": None}))[1]
    if "prompt" in first:
        return prompts.read_prompts(args.data, "topics")
    conversations = prompts.read_conversations(args.data)
    sizes = sorted(set(args.topics or TOPICS))
    if sizes[-1] > len(conversations):
        raise ValueError(f"--topics has {sizes[-1]}, but {args.data} holds {len(conversations)} different topics")
    asked = args.questions if args.position is None else args.position
    if not 1 <= asked <= sizes[0]:
        name = "--position" if args.position is not None else "--questions"
        raise ValueError(f"{name} is {asked}, but the smallest record has {sizes[0]} topics")
    return [
        prompts.topics_group(conversations, size, sample, settings) for size in sizes for sample in range(args.samples)
    ]


def read_predictions(args: argparse.Namespace) -> Rows:
    labels = labels_of(args.score_only, args.labels)
    rows: Rows = []
    for file, label in zip(args.score_only, labels, strict=True):
        rows += prompts.read_predictions(file, _task(args), label)
    return rows


def view(settings: dict[str, Any]) -> View:
    task = settings.get("task") or settings["kinds"][0]
    across = prompts.ACROSS[task]

    def draw(path: Path, summary: dict[str, Any]) -> None:
        curves = {label: model["by_" + across][task] for label, model in summary["models"].items()}
        score_curves(path, curves, f"LongChat {task}: {QUESTIONS[task]}", across.replace("num_", "") + " in the record")

    return View(f"longchat {task}", across, draw)


def _task(args: argparse.Namespace) -> str:
    if args.task is None:
        raise ValueError("--task lines or --task topics is needed (only --plot-only goes without it)")
    return str(args.task)


def _is_file(file: Path | None) -> bool:
    if file is not None and not file.is_file():
        raise ValueError(f"--data {file} is no file")
    return file is not None


def _shown(values: list[int]) -> str:
    return " ".join(map(str, values))


def run(args: argparse.Namespace) -> None:
    run_task(args, view, prepare, read_predictions)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
