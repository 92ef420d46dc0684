"""The loop of every eval of generated answers: refuse, resume, answer group by group, keep rows, report."""

from __future__ import annotations

import argparse
import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyctx.environment import versions
from easyctx.evals.models import (
    check_lengths,
    check_models,
    check_one_engine_model,
    load_config,
    load_generator,
    load_tokenizer,
)
from easyctx.evals.results import (
    append_rows,
    model_fingerprint,
    open_output,
    open_score_output,
    read_rows,
    read_settings,
)
from easyctx.evals.session import Session, add_run_arguments, start
from easyctx.evals.tasks.questions import Answerer, Group, Question, split_shared
from easyctx.evals.tasks.report import FILES, KEY, ROWS_FILE, Rows, View, report, report_folder

if TYPE_CHECKING:
    from easyctx.evals.tasks.shell import PromptShell


@dataclass(frozen=True)
class Work:
    """Everything that an eval asks: settings that rows of one folder share, and the questions in groups."""

    settings: dict[str, Any]
    groups: list[Group]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every eval of generated answers."""
    parser.add_argument("--model", nargs="+", help="folders or hub names; all in one figure")
    parser.add_argument(
        "--labels", nargs="+", help="names of the models (or of --score-only files) in figure and table"
    )
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--seed", type=int, default=42, help="of everything that is drawn (default: %(default)s)")
    answers = parser.add_argument_group("answers (greedy)")
    answers.add_argument("--chat", action="store_true", help="ask through the tokenizer's chat template")
    answers.add_argument("--max-new-tokens", type=int, help="of an answer (default: what the task says)")
    answers.add_argument("--stop", nargs="+", default=[], help="texts that end an answer (\\n is a line break)")
    add_run_arguments(parser)
    parser.add_argument(
        "--offload-cache", action="store_true", help="keep the keys of a context in host memory, for the longest ones"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on in --output (the default)")
    again.add_argument("--overwrite", action="store_true", help="remove earlier results in --output")
    again.add_argument("--plot-only", action="store_true", help="report on the results in --output again")
    again.add_argument(
        "--score-only",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="score these predictions, no model needed; with --output also write table, figure and summary there",
    )


def run_task(
    args: argparse.Namespace,
    view_of: Callable[[dict[str, Any]], View],
    prepare: Callable[[argparse.Namespace], Work],
    read_predictions: Callable[[argparse.Namespace], Rows],
) -> None:
    """The whole eval. Everything that can be refused is refused before a model is loaded."""
    if args.score_only:
        rows = read_predictions(args)
        if args.output:
            open_score_output(args.output)
        settings = {"predictions": [str(file) for file in args.score_only], **rows_settings(rows)}
        report(rows, view_of(settings), args.output, settings, {})
        return
    if not args.output:
        raise ValueError("--output is needed (only --score-only goes without it)")
    if args.plot_only:
        report_folder(args.output, view_of(read_settings(args.output)), None, None)
        return
    if not args.model:
        raise ValueError("--model is needed (only --score-only and --plot-only go without it)")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; give at least 1")
    labels = check_models(args.model, args.labels)
    work = prepare(args)
    session = start(args)
    check_one_engine_model(session, args.model)
    run_models(session, args, labels, work, view_of)


def run_models(
    session: Session,
    args: argparse.Namespace,
    labels: list[str],
    work: Work,
    view_of: Callable[[dict[str, Any]], View],
) -> None:
    """Asks each model what the output folder does not hold yet, and reports on all that was asked."""
    subjects = [_subject(session, model, label, args.chat) for model, label in zip(args.model, labels, strict=True)]
    todo = {subject.label: _open_groups(session, args, work, subject.label) for subject in subjects}
    for subject in subjects:
        _try_prompts(session, todo[subject.label], subject, args.max_new_tokens)
    settings = {
        **work.settings,
        "seed": args.seed,
        "chat": args.chat,
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "dtype": session.precision,
        "models": {
            subject.label: [subject.model, model_fingerprint(subject.model), session.rope_theta] for subject in subjects
        },
    }
    session.on_main(lambda: open_output(args.output, settings, FILES, args.overwrite))
    for subject in subjects:
        _run_model(session, args, todo[subject.label], subject)
        gc.collect()  # the weights of a model go before the next is loaded
    items = {item for group in work.groups for item in group.items}
    session.on_main(lambda: report_folder(args.output, view_of(settings), versions(), items))


def rows_settings(rows: Rows) -> dict[str, Any]:
    """What a view asks of the settings, from rows alone."""
    return {"models": {row["model"]: [] for row in rows}, "kinds": sorted({row["kind"] for row in rows})}


@dataclass(frozen=True)
class _Subject:
    """A model that is not loaded yet, and questions that were built already, by their first item."""

    model: str
    label: str
    shell: PromptShell
    config: Any
    built: dict[str, list[Question]] = field(default_factory=dict)


def _subject(session: Session, model: str, label: str, chat: bool) -> _Subject:
    from easyctx.evals.encoding import TextEncoder
    from easyctx.evals.tasks.shell import PromptShell

    shell = PromptShell(TextEncoder(load_tokenizer(model)), chat)
    return _Subject(model, label, shell, load_config(session, model))


def _open_groups(session: Session, args: argparse.Namespace, work: Work, label: str) -> list[Group]:
    """The groups with a question that the output folder has no answer to, the shortest first."""

    def read() -> set[str]:
        rows = [] if args.overwrite else read_rows(args.output / ROWS_FILE, KEY)
        return {row["item"] for row in rows if row["model"] == label}

    done = session.on_main(read)
    todo = [group for group in work.groups if not done.issuperset(group.items)]
    num_all, num_open = (sum(len(group.items) for group in groups) for groups in (work.groups, todo))
    if num_open < num_all:
        session.say(f"{label}: {num_all - num_open} of {num_all} questions are answered already")
    # Groups of about the same size side by side: data-parallel ranks then wait less for each other.
    return sorted(todo, key=lambda group: group.size)


def _try_prompts(session: Session, groups: list[Group], subject: _Subject, max_new_tokens: int | None) -> None:
    """Builds the shortest prompt of each kind, and the longest of all: what cannot be built, or is too long for the
    model, is refused before a model is loaded."""
    shortest: dict[str, Group] = {}
    for group in groups:
        shortest.setdefault(group.kind, group)
    longest = 0
    for group in (*shortest.values(), *groups[-1:]):
        if group.items[0] not in subject.built:
            questions = subject.built[group.items[0]] = group.build(subject.shell)
            new = max_new_tokens or group.max_new_tokens
            longest = max(longest, *(len(question.ids) + new for question in questions))
    check_lengths(session, subject.label, subject.config, [longest])


def _run_model(session: Session, args: argparse.Namespace, groups: list[Group], subject: _Subject) -> None:
    from tqdm import tqdm

    if not groups:
        return
    generator = load_generator(
        session, subject.model, subject.config, subject.shell.encoder.tokenizer, offload_cache=args.offload_cache
    )
    num_questions = sum(len(group.items) for group in groups)
    progress = tqdm(total=num_questions, desc=subject.label, unit="question", disable=not session.is_main)
    for group, counts in session.share(groups):
        questions = subject.built.pop(group.items[0], None) or group.build(subject.shell)
        new = answer_group(generator, group, questions, args.max_new_tokens or group.max_new_tokens, args.stop)
        kept = session.gather([{"model": subject.label, "seed": args.seed, **row} for row in new] if counts else [])
        if session.is_main:
            append_rows(args.output / ROWS_FILE, kept)
        progress.update(len(kept))
    progress.close()


def answer_group(
    generator: Answerer, group: Group, questions: list[Question], max_new_tokens: int, stop: list[str]
) -> Rows:
    """The rows of answers.jsonl for one group; the shared beginning of its prompts is read once."""
    begin = time.perf_counter()
    context, rests = split_shared([question.ids for question in questions])
    stops = [text.replace("\\n", "\n") for text in stop]
    answers = generator.answer(context, rests, max_new_tokens=max_new_tokens, stop=stops)
    seconds = (time.perf_counter() - begin) / len(questions)
    return [
        {
            "item": question.item,
            "kind": group.kind,
            **question.labels,
            "prompt_tokens": len(question.ids),
            "prompt_hash": hashlib.sha256(question.ids.astype("<i8").tobytes()).hexdigest()[:16],
            "references": question.references,
            "prediction": answer.text,
            "stopped_by": answer.stopped_by,
            "score": group.score(answer.text, question.references),
            "seconds": round(seconds, 4),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
