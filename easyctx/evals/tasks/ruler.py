"""RULER: 13 tasks at growing lengths, and the longest length at which a model still does them.

    python eval/ruler.py --model DIR --haystack essays/ --squad dev-v2.0.json \\
        --hotpotqa hotpot_dev_distractor_v1.json --lengths 4096 8192 16384 --output DIR
    python eval/ruler.py --model DIR --tasks niah_single_1 vt cwe fwe --output DIR
    python eval/ruler.py --score-only 4096/pred/*.jsonl --labels MODEL

Eight kinds of needles, variable tracking, common words, frequent words and two reading tasks. An answer's
score is the share of its references that it holds (reading: whether it holds one); the effective length is
the longest whose average over the tasks is at least 85.6 percent. Prompt and answer together have exactly
the length. Every answer is a row of answers.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from easyctx.evals.command import started_as
from easyctx.evals.grid import add_length_arguments, lengths_of
from easyctx.evals.plots import Panel, heatmaps, length_labels
from easyctx.evals.session import run_main
from easyctx.evals.tasks import ruler_tasks
from easyctx.evals.tasks.predictions import field_of, prediction_of, read_records, texts_of
from easyctx.evals.tasks.questions import Group
from easyctx.evals.tasks.report import Rows, View
from easyctx.evals.tasks.ruler_groups import Sources, group_of, length_of, prepared_groups
from easyctx.evals.tasks.ruler_qa import read_hotpotqa, read_squad
from easyctx.evals.tasks.ruler_tasks import TASKS, THRESHOLD, effective_length, weighted_average
from easyctx.evals.tasks.runner import Work, add_task_arguments, run_task
from easyctx.evals.tasks.templates import add_template_argument, read_templates
from easyctx.evals.textio import read_haystack
from easyctx.parser import Parser

LENGTHS = [4096, 8192, 16384, 32768]


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=started_as("ruler"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        metavar="TASK",
        default=list(TASKS),
        help=f"of {', '.join(TASKS)} (default: all 13)",
    )
    add_length_arguments(parser, LENGTHS)
    parser.add_argument("--samples", type=int, default=20, help="of a task and length (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="of the effective length, in percent")
    sources = parser.add_argument_group("what prompts are made of")
    sources.add_argument("--haystack", type=Path, help="a .txt file or a folder of them, for needles in an essay")
    sources.add_argument("--squad", type=Path, help="JSON file in SQuAD's form, for qa_1")
    sources.add_argument("--hotpotqa", type=Path, help="JSON file in HotpotQA's form (distractor), for qa_2")
    sources.add_argument("--data", type=Path, help="folder that NVIDIA/RULER's scripts prepared, in place of all these")
    add_template_argument(parser, ruler_tasks.TEMPLATES)
    add_task_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> Work:
    """The questions. Raises ValueError for sources that are missing or in another form."""
    tasks = [task for task in TASKS if task in args.tasks]
    if args.samples < 1:
        raise ValueError(f"--samples is {args.samples}; give at least 1")
    if args.data:
        if not args.data.is_dir():
            raise ValueError(f"--data {args.data} is no folder")
        return Work({"eval": "ruler", "data": str(args.data.resolve())}, prepared_groups(args.data, tasks))
    missing = {task: ruler_tasks.needs(task) for task in tasks}
    missing = {task: flag for task, flag in missing.items() if flag and getattr(args, flag) is None}
    if missing:
        flags = " and ".join(f"--{flag}" for flag in dict.fromkeys(missing.values()))
        raise ValueError(
            f"{', '.join(missing)} need {flags}; give them, or leave these tasks out: "
            f"--tasks {' '.join(task for task in tasks if task not in missing) or 'niah_single_1'}"
        )
    lengths = lengths_of(args)
    sources = _sources(args, tasks)
    sources.longest = lengths[-1]
    settings = {
        "eval": "ruler",
        "templates_sha256": _sha256(repr(sorted(sources.templates.items())).encode()),
        "haystack_sha256": _sha256(sources.essay.encode()) if sources.essay else None,
        **{
            f"{name}_sha256": _sha256(getattr(args, name).read_bytes()) if name in sources.collections else None
            for name in ("squad", "hotpotqa")
        },
    }
    return Work(settings, _groups(args, tasks, lengths, sources))


def _groups(args: argparse.Namespace, tasks: list[str], lengths: list[int], sources: Sources) -> list[Group]:
    return [
        group_of(task, length, sample, sources, args.max_new_tokens or TASKS[task].max_new_tokens)
        for length in lengths
        for task in tasks
        for sample in range(args.samples)
    ]


def _sources(args: argparse.Namespace, tasks: list[str]) -> Sources:
    wanted = {ruler_tasks.needs(task) for task in tasks}
    readers = {"squad": read_squad, "hotpotqa": read_hotpotqa}
    return Sources(
        templates=read_templates(args.templates, ruler_tasks.TEMPLATES),
        seed=args.seed,
        essay=read_haystack(args.haystack) if "haystack" in wanted else None,
        collections={name: read(getattr(args, name)) for name, read in readers.items() if name in wanted},
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_predictions(args: argparse.Namespace) -> Rows:
    """Rows of our own answers.jsonl, or of NVIDIA's pred/TASK.jsonl (`pred`, `outputs`)."""
    rows: Rows = []
    for file in args.score_only:
        for number, (place, row) in enumerate(read_records(file)):
            task = str(row.get("kind") or row.get("task") or file.name.split(".")[0])
            if task not in TASKS:
                raise ValueError(
                    f"{place}: {task!r} is no task of RULER; name the file after one of {', '.join(TASKS)}"
                )
            # NVIDIA's rows give the tokens of each prompt, and its folders the length that was asked for.
            given = int(field_of(row, ("length",), place)) if "kind" in row or not length_of(file) else None
            length = given or length_of(file)
            references = texts_of(field_of(row, ("references", "outputs"), place), place)
            prediction = prediction_of(row, place)
            rows.append(
                {
                    "model": row.get("model") or (args.labels or ["predictions"])[0],
                    "item": row.get("item", f"{task}/{length}/{row.get('index', number)}"),
                    "kind": task,
                    "length": length,
                    "references": references,
                    "prediction": prediction,
                    "score": TASKS[task].score(prediction, references),
                }
            )
    if not rows:
        raise ValueError("--score-only: the files hold no prediction")
    return rows


def effective_lengths(summary: dict[str, Any], threshold: float) -> dict[str, Any]:
    """For each model: effective length, and the paper's two weighted averages."""
    return {
        "threshold": threshold,
        "effective_length": {
            label: effective_length(model["average"], threshold) for label, model in summary["models"].items()
        },
        "weighted_average": {
            label: {
                "increasing": weighted_average(model["average"], increasing=True),
                "decreasing": weighted_average(model["average"], increasing=False),
            }
            for label, model in summary["models"].items()
        },
    }


def view_of(settings: dict[str, Any], threshold: float) -> View:
    def draw(path: Path, summary: dict[str, Any]) -> None:
        panels = [
            _panel(label, model, _effective(summary["effective_length"][label], threshold, model))
            for label, model in summary["models"].items()
        ]
        xlabel = "prompt and answer (tokens)"
        heatmaps(path, panels, title="RULER", xlabel=xlabel, ylabel="", scale="score (numbers: percent)")

    def notes(summary: dict[str, Any]) -> list[str]:
        return [
            f"effective length of {label}: {_effective(length, threshold, summary['models'][label])}"
            for label, length in summary["effective_length"].items()
        ]

    return View("ruler", "length", draw, lambda summary: effective_lengths(summary, threshold), notes)


def _panel(label: str, model: dict[str, Any], effective: str) -> Panel:
    """Tasks down and their average last, lengths across."""
    tasks = [task for task in TASKS if task in model["by_length"]]
    scores = {**{task: model["by_length"][task] for task in tasks}, "average": model["average"]}
    return Panel(
        f"{label}: effective length {effective}",
        {(task, length): share["mean"] for task, shares in scores.items() for length, share in shares.items()},
        {task: task for task in scores},
        {str(length): shown for length, shown in length_labels(sorted(map(int, model["average"]))).items()},
        lambda share: f"{100 * share:.1f}".removesuffix(".0"),
    )


def _effective(length: int | None, threshold: float, model: dict[str, Any]) -> str:
    shown = "none" if length is None else length_labels(map(int, model["average"]))[length]
    num_tasks = len(model["by_kind"])
    of = "" if num_tasks == len(TASKS) else f", {num_tasks} of {len(TASKS)} tasks"
    return f"{shown} (average of at least {threshold:g}{of})"


def run(args: argparse.Namespace) -> None:
    run_task(args, lambda settings: view_of(settings, args.threshold), prepare, read_predictions)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
