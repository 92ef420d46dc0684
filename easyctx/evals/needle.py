"""Needle in a haystack: does the model find a number that one sentence of a long text hides?

    python eval/needle.py --model DIR --haystack FOLDER --lengths 1000 2000 4000 --output DIR
    accelerate launch --config_file X.yaml eval/needle.py ... --parallel_mode zigzag_ring_attn
    torchrun --nproc-per-node 8 eval/needle.py ...

A prompt is right if all tokens of the answer are the argmax under teacher forcing, which is the same as a
greedy answer that begins with it. What prompts begin with alike is computed once; how much that is follows
from --depth-by. Every finished prompt is a row of cells.jsonl; the same command goes on where it was
stopped. After Greg Kamradt's needle-in-a-haystack and the single-needle form of EasyContext.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyctx.environment import versions
from easyctx.evals.command import started_as
from easyctx.evals.grid import add_length_arguments, depths_of, lengths_of
from easyctx.evals.models import (
    check_lengths,
    check_models,
    check_one_engine_model,
    load_config,
    load_scorer,
    load_tokenizer,
)
from easyctx.evals.needle_report import COMPARISON_FILE, FILES, KEY, ROWS_FILE, VERIFY_FILE, compare, report
from easyctx.evals.needle_scores import TRUNK_KEYS, in_order, make_trunk_scorer, score_cells, verify
from easyctx.evals.results import (
    model_fingerprint,
    open_output,
    read_rows,
    read_settings,
)
from easyctx.evals.session import Session, add_run_arguments, run_main, start
from easyctx.evals.textio import read_haystack
from easyctx.parser import Parser

if TYPE_CHECKING:
    from easyctx.evals.needle_prompts import Cell, NeedlePrompts, NeedleSettings

LENGTHS = [1000, 2000, 4000, 8000]


@dataclass(frozen=True)
class Cost:
    """Whether what prompts begin with alike is computed once, and where its keys are kept; how many of them are also
    run alone, to compare."""

    share: bool = True
    verify: int = 0
    trunk_keys: str = "auto"


DEFAULT_COST = Cost()


def make_parser() -> argparse.ArgumentParser:
    from easyctx.evals import needle_settings as prompts

    parser = Parser(prog=started_as("needle"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", help="folders or hub names; several: one folder each in --output")
    parser.add_argument("--labels", nargs="+", help="names of the models in titles and folders")
    parser.add_argument("--haystack", type=Path, help="a .txt file, or a folder of them (sorted and joined)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    add_length_arguments(parser, LENGTHS)
    grid = parser.add_argument_group("prompts")
    grid.add_argument(
        "--depths", nargs="+", default=["11"], help="a number of depths from 0 to 100%%, or depths in percent"
    )
    grid.add_argument(
        "--depth-by",
        choices=list(prompts.DEPTHS_BY),
        help=f"depths are {'; '.join(f'{name}: {what}' for name, what in prompts.DEPTHS_BY.items())} (default: place, "
        f"which costs less; fraction with --needles, --distractors or a length under {prompts.PLACES_FROM})",
    )
    grid.add_argument("--samples", type=int, default=1, help="prompts for each length and depth")
    grid.add_argument("--digits", type=int, default=7, help="of the hidden number")
    grid.add_argument("--needles", type=int, default=1, help="hidden in each prompt, and all asked for at once")
    grid.add_argument("--distractors", type=int, default=0, help="needles with other cities and numbers")
    grid.add_argument("--seed", type=int, default=42, help="of numbers, cities and distractors")
    grid.add_argument(
        "--shift-haystack", action="store_true", help="begin each sample at another sentence of the haystack"
    )
    texts = parser.add_argument_group("templates ({city} and {number} are filled in, \\n is a line break)")
    texts.add_argument("--prefix", default=prompts.PREFIX, help="before the haystack")
    texts.add_argument("--needle", default=prompts.NEEDLE, help="put after a sentence; holds {number}")
    texts.add_argument("--question", default=prompts.QUESTION, help="after the haystack")
    texts.add_argument("--answer-stub", default=prompts.ANSWER_STUB, help="the number follows without a space")
    add_run_arguments(parser)
    cost = parser.add_argument_group("cost")
    cost.add_argument(
        "--each-prompt-alone",
        action="store_true",
        help="run every prompt from its first token (by default what prompts begin with alike is computed once)",
    )
    cost.add_argument(
        "--trunk-keys",
        choices=list(TRUNK_KEYS),
        default="auto",
        help=f"where the keys of that are kept; {'; '.join(f'{name}: {what}' for name, what in TRUNK_KEYS.items())}",
    )
    cost.add_argument(
        "--verify", type=int, default=0, metavar="K", help="run K prompts both ways and report the difference of logits"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on in --output (the default)")
    again.add_argument("--overwrite", action="store_true", help="remove earlier results in --output")
    again.add_argument("--plot-only", action="store_true", help="draw the results in --output again")
    return parser


def settings_of(args: argparse.Namespace) -> NeedleSettings:
    """The prompt settings of the command line. Raises ValueError for templates that do not fit together."""
    from easyctx.evals import needle_settings as prompts
    from easyctx.evals.needle_settings import NeedleSettings, default_depth_by

    one_needle = args.needles == 1 and args.distractors == 0
    question, answer_stub = args.question, args.answer_stub
    if args.needles > 1 and (question, answer_stub) == (prompts.QUESTION, prompts.ANSWER_STUB):
        question, answer_stub = prompts.QUESTION_FOR_SEVERAL, prompts.ANSWER_STUB_FOR_SEVERAL
    return NeedleSettings(
        prefix=args.prefix.replace("\\n", "\n"),
        needle=args.needle.replace("\\n", "\n"),
        question=question.replace("\\n", "\n"),
        answer_stub=answer_stub.replace("\\n", "\n"),
        digits=args.digits,
        distractors=args.distractors,
        seed=args.seed,
        shift_haystack=args.shift_haystack,
        depth_by=args.depth_by or default_depth_by(lengths_of(args), depths_of(args.depths), one_needle=one_needle),
        needles=args.needles,
    )


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The grid, shortest prompts first. Raises ValueError for lengths, depths or samples out of range."""
    from easyctx.evals.needle_settings import Cell

    if args.samples < 1:
        raise ValueError(f"--samples is {args.samples}; give at least 1")
    depths, lengths = depths_of(args.depths), lengths_of(args)
    cells = [Cell(length, depth, sample) for length in lengths for sample in range(args.samples) for depth in depths]
    if args.depth_by == "position":
        cells = [cell for cell in cells if cell.depth / 100 * lengths[-1] <= cell.length]
    if not cells:
        raise ValueError(f"--depth-by position: the first of --depths, {depths[0]:g}%, lies in none of --lengths")
    return cells


def run(args: argparse.Namespace) -> None:
    """The whole eval. Everything that can be refused is refused before a model is loaded."""
    from easyctx.evals.needle_settings import DEPTHS_BY, check_numbers

    if args.plot_only:
        _plot_only(args.output)
        return
    if not args.model or not args.haystack:
        raise ValueError("--model and --haystack are needed (only --plot-only goes without them)")
    settings, cells = settings_of(args), cells_of(args)
    if args.verify < 0 or (args.verify and args.each_prompt_alone):
        raise ValueError("--verify takes a number of prompts, and goes without --each-prompt-alone")
    check_numbers(settings, cells)
    labels = check_models(args.model, args.labels)
    haystack = read_haystack(args.haystack)
    session = start(args)
    check_one_engine_model(session, args.model)
    session.say(f"depths by {settings.depth_by}: {DEPTHS_BY[settings.depth_by]}")
    folders = {label: args.output / label if len(labels) > 1 else args.output for label in labels}
    for model, (label, folder) in zip(args.model, folders.items(), strict=True):
        how = Cost(not args.each_prompt_alone, args.verify, args.trunk_keys)
        run_model(session, model, label, folder, settings, cells, haystack, overwrite=args.overwrite, cost=how)
    if len(folders) > 1:
        session.on_main(lambda: compare(args.output / COMPARISON_FILE, folders, cells))


def run_model(
    session: Session,
    model: str,
    label: str,
    folder: Path,
    settings: NeedleSettings,
    cells: list[Cell],
    haystack: str,
    *,
    overwrite: bool,
    cost: Cost = DEFAULT_COST,
) -> None:
    """Runs the cells that `folder` does not hold yet, and reports on all that it holds."""
    from easyctx.evals.encoding import TextEncoder
    from easyctx.evals.needle_prompts import NeedlePrompts

    lengths = sorted({cell.length for cell in cells})
    prompts = NeedlePrompts(TextEncoder(load_tokenizer(model)), haystack, max(lengths), settings)
    prompts.check_length(min(lengths))
    config = load_config(session, model)
    check_lengths(session, label, config, lengths)
    kept = {
        "eval": "needle",
        **asdict(settings),
        "haystack_sha256": hashlib.sha256(haystack.encode()).hexdigest()[:16],
        "dtype": session.precision,
        "rope_theta": session.rope_theta,
        "models": {label: [model, model_fingerprint(model)]},
    }

    def prepare() -> dict[tuple[Any, ...], str]:
        open_output(folder, kept, FILES, overwrite)
        rows = read_rows(folder / ROWS_FILE, KEY)
        return {tuple(row[name] for name in KEY): row["prompt_hash"] for row in rows}

    done = session.on_main(prepare)
    open_cells = _open_cells(session, prompts, cells, done)
    if len(open_cells) < len(cells):
        session.say(f"{label}: {len(cells) - len(open_cells)} of {len(cells)} prompts are done already")
    if open_cells or cost.verify:
        scorer = load_scorer(session, model, config)
        trunk = make_trunk_scorer(session, scorer, max(lengths), cost.trunk_keys) if cost.share else None
        score_cells(session, trunk or scorer, prompts, open_cells, folder / ROWS_FILE)
        if cost.verify and trunk is not None:
            verify(session, scorer, trunk, prompts, cells, cost.verify, folder / VERIFY_FILE)
    session.on_main(lambda: report(folder, label, versions(), cells))


def _open_cells(
    session: Session, prompts: NeedlePrompts, cells: list[Cell], done: dict[tuple[Any, ...], str]
) -> list[Cell]:
    """The cells without a row for the very same prompt; every data-parallel rank looks at a part."""
    open_cells: list[Cell] = []
    for cell, counts in session.share(cells):
        if counts:
            before = done.get((cell.length, cell.depth, cell.sample))
            if before is None or prompts.build(cell).hash != before:
                open_cells.append(cell)
    return in_order(session.gather(open_cells), prompts.settings)


def _plot_only(output: Path) -> None:
    files = [output / ROWS_FILE, *sorted(output.glob(f"*/{ROWS_FILE}"))]
    folders = [file.parent for file in files if file.exists()]
    if not folders:
        raise ValueError(f"--output {output} holds no {ROWS_FILE} to plot")
    by_label = {next(iter(read_settings(folder)["models"])): folder for folder in folders}
    for label, folder in by_label.items():
        report(folder, label, versions=None, cells=None)
    if len(by_label) > 1:
        compare(output / COMPARISON_FILE, by_label, cells=None)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
