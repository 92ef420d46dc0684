"""NarrativeQA: questions on whole books and scripts, in ZeroSCROLLS' form, by token F1.

    python eval/narrativeqa.py --model DIR --data validation.jsonl --max-length 100000 --output DIR
    python eval/narrativeqa.py --score-only predictions.json --data validation.jsonl

Prompts are as given; what is longer than --max-length loses the end of its document and keeps separator
and query. F1 of the words of answer and reference, the best over the references of an id, mean over ids.
Questions on one document share its keys and values. Every answer is a row of answers.jsonl; the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from easyctx.evals.charts import score_bars
from easyctx.evals.command import started_as
from easyctx.evals.results import write_json
from easyctx.evals.session import run_main
from easyctx.evals.tasks import narrativeqa_data as data
from easyctx.evals.tasks.predictions import labels_of
from easyctx.evals.tasks.report import Rows, View
from easyctx.evals.tasks.runner import Work, add_task_arguments, run_task
from easyctx.parser import Parser


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=started_as("narrativeqa"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="JSONL or JSON list of ZeroSCROLLS' rows")
    parser.add_argument(
        "--max-length", type=int, help="tokens of prompt and answer; longer documents are cut (default: no cut)"
    )
    parser.add_argument("--max-questions", type=int, help="only the first so many (default: all)")
    add_task_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> Work:
    """The questions. Raises ValueError for data that cannot be asked or scored."""
    if not args.data:
        raise ValueError("--data is needed: JSONL or a JSON list in ZeroSCROLLS' form")
    max_new_tokens = args.max_new_tokens or data.MAX_NEW_TOKENS
    for name in ("max_length", "max_questions"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    examples = data.read_examples(args.data)[: args.max_questions]
    unanswered = [example.id for example in examples if not example.references]
    if unanswered:
        raise ValueError(f"{args.data}: {len(unanswered)} ids have no output to compare with, such as {unanswered[0]}")
    settings = {
        "eval": "narrativeqa",
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest()[:16],
        "max_length": args.max_length,
    }
    return Work(settings, data.groups_of(examples, args.max_length, max_new_tokens))


def read_predictions(args: argparse.Namespace) -> Rows:
    references = {example.id: example.references for example in data.read_examples(args.data)} if args.data else {}
    labels = labels_of(args.score_only, args.labels)
    rows: Rows = []
    for file, label in zip(args.score_only, labels, strict=True):
        rows += data.read_predictions(file, label, references)
    return rows


def view(settings: dict[str, Any]) -> View:
    def draw(path: Path, summary: dict[str, Any]) -> None:
        counts = {model["num_answers"] for model in summary["models"].values()}
        shown = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
        length = f", at most {settings['max_length']} tokens" if settings.get("max_length") else ""
        subtitle = f"{shown} questions{length}; line: 95% bootstrap interval over questions"
        score_bars(path, summary["models"], "NarrativeQA", subtitle, "token F1")

    return View("narrativeqa", None, draw, save=save_predictions)


def save_predictions(folder: Path, rows: Rows) -> None:
    """predictions_LABEL.json of each model: the text by id, as ZeroSCROLLS takes it."""
    by_model: dict[str, dict[str, str]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["item"]] = row["prediction"]
    for label, texts in by_model.items():
        write_json(folder / f"predictions_{label.replace('/', '_')}.json", texts)


def run(args: argparse.Namespace) -> None:
    run_task(args, view, prepare, read_predictions)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
