"""Elo: models compared in pairs by a judge, on their answers to the same questions.

    python eval/elo.py --questions question.jsonl --answers a.jsonl b.jsonl \\
        --judge-url http://localhost:8000/v1 --judge-model NAME --output DIR
    python eval/elo.py --questions question.jsonl --answers a.jsonl b.jsonl --judge DIR --output DIR
    python eval/elo.py --score-only verdicts.jsonl

All pairs meet equally often, each question in both orders. E = 1 / (1 + 10^((Rb - Ra) / 400)), a tie counts
half; the order of battles matters to Elo, so its bootstrap interval and the Bradley-Terry rating stand beside
it. Every verdict is a row of verdicts.jsonl and is not asked for again; an answer of the judge that cannot be
read is asked for again, then counted, and never scored.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyctx.environment import versions
from easyctx.evals.command import started_as
from easyctx.evals.models import check_models, load_config, load_generator, load_tokenizer
from easyctx.evals.results import append_rows, open_output, open_score_output, read_rows, read_settings
from easyctx.evals.session import Session, add_run_arguments, run_main, start
from easyctx.evals.tasks.templates import add_template_argument, read_templates
from easyctx.evals.tournament import judge as judging
from easyctx.evals.tournament.data import answered_by_all, battle_of, read_answers, read_battles, read_questions
from easyctx.evals.tournament.ratings import START, Battle, K, Round, schedule
from easyctx.evals.tournament.report import FILES, KEY, ROWS_FILE, SUMMARY_FILE, leaderboard, report
from easyctx.parser import Parser

if TYPE_CHECKING:
    from easyctx.evals.tournament.judge import Judge

SEED = 42


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=started_as("elo"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--questions", type=Path, help="JSONL of question_id and text (or turns)")
    parser.add_argument(
        "--answers", type=Path, nargs="+", help="a JSONL file a model, of question_id and text (or choices)"
    )
    parser.add_argument("--labels", nargs="+", help="names of the models (default: model_id, or the file's name)")
    parser.add_argument("--output", type=Path, help="folder of the results")
    rounds = parser.add_argument_group("tournament")
    rounds.add_argument("--rounds", type=int, default=300, help="battles (default: %(default)s)")
    rounds.add_argument("--seed", type=int, help=f"of pairs and questions (default: {SEED})")
    rounds.add_argument("--k", type=float, help=f"most points that a battle moves (default: {K:g})")
    rounds.add_argument("--start", type=float, help=f"rating at the beginning (default: {START:g})")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge-url", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    judge.add_argument("--judge-model", help="the endpoint's name of its model")
    judge.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", help="environment variable of the key, if one is needed"
    )
    judge.add_argument("--judge", help="instead: folder or hub name of a model to judge on this machine")
    judge.add_argument("--tries", type=int, default=3, help="to get a verdict that can be read (default: %(default)s)")
    add_template_argument(parser, judging.TEMPLATES)
    add_run_arguments(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on in --output (the default)")
    again.add_argument("--overwrite", action="store_true", help="remove earlier results in --output")
    again.add_argument(
        "--plot-only",
        action="store_true",
        help="compute the ratings in --output again, with the seed, k and start of the run unless they are given",
    )
    again.add_argument(
        "--score-only",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="rate these battles (verdicts.jsonl, or rows of model_a, model_b and winner); no judge is asked",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """The whole tournament. Everything that can be refused is refused before a judge is asked."""
    if args.score_only:
        battles, failed = read_battles(args.score_only)
        if args.output:
            open_score_output(args.output)
        settings = {"battles": [str(file) for file in args.score_only]}
        _report(args.output, battles, failed, _rating(args), settings, {})
        return
    if not args.output:
        raise ValueError("--output is needed (only --score-only goes without it)")
    if args.plot_only:
        _plot_only(args)
        return
    if not args.questions or not args.answers:
        raise ValueError("--questions and --answers are needed (only --plot-only and --score-only go without them)")
    for name in ("rounds", "tries"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; give at least 1")
    _tournament(args)


def _rating(args: argparse.Namespace, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Seed, k and start: as given, else those of the summary `before`, else the defaults."""
    given = {name: getattr(args, name) for name in ("k", "start", "seed")}
    known = {"k": K, "start": START, "seed": SEED} | (before or {}).get("rating", {})
    return {**known, **{name: value for name, value in given.items() if value is not None}}


def _plot_only(args: argparse.Namespace) -> None:
    """The tournament of the last summary again; where none was finished, the verdicts that there are."""
    settings, file = read_settings(args.output), args.output / SUMMARY_FILE
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rounds = [Round(*each) for each in before.get("rounds", [])]
    _report_rounds(args.output, rounds, _rating(args, before), settings, before.get("versions", {}))


def _tournament(args: argparse.Namespace) -> None:
    questions = read_questions(args.questions)
    answers = read_answers(args.answers, args.labels)
    common = answered_by_all(questions, answers)
    templates = read_templates(args.templates, judging.TEMPLATES)
    if (args.judge_url is None) == (args.judge is None):
        raise ValueError("give one judge: --judge-url with --judge-model, or --judge with a model's folder")
    rating = _rating(args)
    rounds = schedule(common, list(answers), args.rounds, rating["seed"])
    settings = {
        "eval": "elo",
        "judge": args.judge or args.judge_model,
        "templates": templates,
        "questions_sha256": _sha256(sorted(questions.items())),
        "models": {label: [_sha256(sorted(given.items()))] for label, given in answers.items()},
    }
    judge, session = _make_judge(args)
    say = session.say if session else print
    if len(common) < len(questions):
        say(f"{len(questions) - len(common)} of {len(questions)} questions are left out: not every model answered them")

    def prepare() -> list[dict[str, Any]]:
        open_output(args.output, settings, FILES, args.overwrite)
        return read_rows(args.output / ROWS_FILE, KEY)

    done = {Round(row["question"], row["first"], row["second"]) for row in _on_main(session, prepare)}
    todo = [each for each in dict.fromkeys(rounds) if each not in done]
    if len(todo) < len(set(rounds)):
        say(f"{len(set(rounds)) - len(todo)} of {len(set(rounds))} verdicts are there already")
    for each, row in _verdicts(session, judge, todo, templates, questions, answers, args.tries):
        append_rows(args.output / ROWS_FILE, [{**asdict(each), **row}])
    _on_main(session, lambda: _report_rounds(args.output, rounds, rating, settings, versions()))


def _make_judge(args: argparse.Namespace) -> tuple[Judge, Session | None]:
    """The judge; a session where it is a model of this machine."""
    if args.judge_url:
        return judging.make_http_judge(args.judge_url, args.judge_model, args.api_key_env, _say), None
    check_models([args.judge])
    session = start(args)
    if session.mesh.dp_size > 1:
        raise ValueError(
            f"--judge on {session.mesh.dp_size} groups of processes: start one process, or a sequence-parallel mode"
        )
    tokenizer, config = load_tokenizer(args.judge), load_config(session, args.judge)
    return judging.LocalJudge(load_generator(session, args.judge, config, tokenizer), tokenizer), session


def _verdicts(
    session: Session | None,
    judge: Judge,
    todo: Sequence[Round],
    templates: dict[str, str],
    questions: dict[str, str],
    answers: dict[str, dict[str, str]],
    tries: int,
) -> Iterator[tuple[Round, dict[str, Any]]]:
    """Each round with its row, on the first rank; the other ranks of a local judge only take part in asking."""
    from tqdm import tqdm

    is_main = session is None or session.is_main
    with tqdm(total=len(todo), desc="judge", unit="battle", disable=not is_main) as progress:
        failed = 0
        for each in todo:
            begin = time.perf_counter()
            first, second = (answers[model][each.question] for model in (each.first, each.second))
            verdict = judging.compare(judge, templates, questions[each.question], first, second, tries)
            failed += verdict.scores is None
            progress.update()
            progress.set_postfix_str(f"{failed} could not be read", refresh=False)
            if is_main:
                yield each, {**asdict(verdict), "seconds": round(time.perf_counter() - begin, 4)}


def _report_rounds(
    folder: Path, rounds: list[Round], rating: dict[str, Any], settings: dict[str, Any], used: dict[str, str]
) -> None:
    """On all of these rounds in their order (none: on all verdicts); a verdict counts as often as its round comes."""
    rows = {Round(row["question"], row["first"], row["second"]): row for row in read_rows(folder / ROWS_FILE, KEY)}
    rounds = rounds or list(rows)
    _report(folder, *_split([rows[each] for each in rounds]), rating, settings, used, rounds)


def _split(rows: list[dict[str, Any]]) -> tuple[list[Battle], int]:
    """The battles with a verdict, and the number of those without one."""
    battles = [battle_of(row) for row in rows if row["scores"] is not None]
    if not battles:
        raise ValueError(f"none of {len(rows)} verdicts of the judge could be read; see text in {ROWS_FILE}")
    return battles, len(rows) - len(battles)


def _report(
    folder: Path | None,
    battles: list[Battle],
    num_failed: int,
    rating: dict[str, Any],
    settings: dict[str, Any],
    used: dict[str, str],
    rounds: Sequence[Round] = (),
) -> None:
    models = list(dict.fromkeys(name for battle in battles for name in (battle.first, battle.second)))
    board = leaderboard(battles, models, **rating)
    counts = {"num_battles": len(battles), "num_failed": num_failed, "rounds": [astuple(each) for each in rounds]}
    report(folder, board, {**counts, "rating": rating, "settings": settings, "versions": used})


def _on_main(session: Session | None, function: Any) -> Any:
    return session.on_main(function) if session else function()


def _say(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text)


def _sha256(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
