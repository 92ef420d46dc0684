"""Perplexity by length: what does a longer context give the model, and where does it break?

    python eval/perplexity.py --model BEFORE AFTER --data TEXT.txt --lengths 256 512 1024 --output DIR
    accelerate launch --config_file X.yaml eval/perplexity.py ... --parallel_mode zigzag_ring_attn

exp of the token-weighted mean negative log-likelihood (NLL) of BOS + document. By default all lengths come
from one forward of the longest: attention is causal, so the first L tokens do not know what follows, and the
mean over their predictions is exactly that of a forward of L tokens. But the first tokens of a text may be easier than
those behind: `--window last` scores the same tokens at every length. Every finished document is a row of
documents.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from easyctx.data.tokenised import check_models_tokenizer
from easyctx.environment import versions
from easyctx.evals.command import started_as
from easyctx.evals.documents import Document, check_data, read_documents
from easyctx.evals.grid import add_length_arguments, lengths_of
from easyctx.evals.models import (
    check_lengths,
    check_models,
    check_one_engine_model,
    load_config,
    load_scorer,
    load_tokenizer,
)
from easyctx.evals.perplexity_report import FILES, KEY, ROWS_FILE, report
from easyctx.evals.perplexity_windows import LAST, PREFIX, SLIDING, WINDOWS, Window, score_document
from easyctx.evals.results import append_rows, model_fingerprint, open_output, read_rows
from easyctx.evals.session import Session, add_run_arguments, run_main, start
from easyctx.parser import Parser

if TYPE_CHECKING:
    from easyctx.evals.scoring import Scorer

LENGTHS = [1024, 2048, 4096, 8192]


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=started_as("perplexity"), description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", help="folders or hub names; all in one figure")
    parser.add_argument("--labels", nargs="+", help="names of the models in figure and tables")
    parser.add_argument(
        "--data", type=Path, help=".txt or .jsonl, a folder of them, or a folder of tokenised datasets rows"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    add_length_arguments(parser, LENGTHS)
    choice = parser.add_argument_group("documents and windows")
    choice.add_argument("--max-documents", type=int, help="at most so many documents (default: all)")
    choice.add_argument("--min-tokens", type=int, help="leave shorter ones out (default: the longest length)")
    choice.add_argument(
        "--data-split", help="of a dataset that has several (default: the only one, or the one for validation)"
    )
    choice.add_argument("--split", action="store_true", help="cut long documents into several of that length")
    choice.add_argument("--text-field", default="text", help="of JSON lines (default: %(default)s)")
    choice.add_argument(
        "--window",
        choices=WINDOWS,
        default="prefix",
        help="prefix: the first L tokens, all lengths in one forward; sliding: windows of L tokens that move "
        "by --stride, each token scored once; last: at every length the same last --targets tokens of a document, "
        "behind what comes before them (default: %(default)s)",
    )
    choice.add_argument("--stride", type=int, help="tokens by which a sliding window moves")
    choice.add_argument("--targets", type=int, help="tokens that --window last scores")
    choice.add_argument("--max-tokens", type=int, help="of a document, if sliding (default: the longest length)")
    choice.add_argument("--num-bins", type=int, default=16, help="bins of the NLL by position")
    add_run_arguments(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on in --output (the default)")
    again.add_argument("--overwrite", action="store_true", help="remove earlier results in --output")
    again.add_argument("--plot-only", action="store_true", help="draw the results in --output again")
    return parser


def check_values(args: argparse.Namespace, lengths: list[int]) -> None:
    """Raises ValueError for numbers that make no sense together; fills in what follows from the lengths."""
    for name in ("max_documents", "min_tokens", "stride", "targets", "num_bins"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if (args.window == SLIDING) != (args.stride is not None):
        raise ValueError(f"--window {args.window} and --stride {args.stride}: a sliding window needs a stride")
    if (args.window == LAST) != (args.targets is not None):
        raise ValueError(
            f"--window {args.window} and --targets {args.targets}: the last tokens need a number of them; give both "
            "--window last and --targets N, or neither"
        )
    if args.targets is not None and args.targets >= lengths[0]:
        raise ValueError(f"--targets {args.targets} leaves nothing before them at length {lengths[0]}; give fewer")
    if args.stride is not None and args.stride > lengths[0]:
        raise ValueError(f"--stride {args.stride} jumps over tokens at length {lengths[0]}; give at most that")
    if args.max_tokens is not None and args.window != SLIDING:
        raise ValueError(
            f"--max-tokens is for --window sliding, and is {args.max_tokens} with --window {args.window}, where "
            "--lengths says how far documents are read: leave it out"
        )
    args.max_tokens = args.max_tokens or lengths[-1]
    if args.max_tokens < lengths[-1]:
        raise ValueError(f"--max-tokens is {args.max_tokens}, less than the longest length {lengths[-1]}")
    args.min_tokens = args.min_tokens or args.max_tokens
    if args.window == LAST and args.min_tokens < args.max_tokens:
        raise ValueError(
            f"--min-tokens is {args.min_tokens}, and --window last compares documents of {args.max_tokens} tokens at "
            "every length: leave it out, or give shorter --lengths"
        )
    if args.min_tokens < lengths[0]:
        raise ValueError(f"--min-tokens is {args.min_tokens}, less than the shortest length {lengths[0]}")


def run(args: argparse.Namespace) -> None:
    """The whole eval. Everything that can be refused is refused before a model is loaded."""
    if args.plot_only:
        report(args.output, versions=None, lengths=None)
        return
    if not args.model or not args.data:
        raise ValueError("--model and --data are needed (only --plot-only goes without them)")
    lengths = lengths_of(args)
    check_values(args, lengths)
    labels = check_models(args.model, args.labels)
    args.data_split = check_data(args.data, args.data_split)
    session = start(args)
    check_one_engine_model(session, args.model)
    tasks = [_prepare(session, model, label, args) for model, label in zip(args.model, labels, strict=True)]
    settings = {
        "eval": "perplexity",
        "data": str(args.data.resolve()),
        **{name: getattr(args, name) for name in ("window", "stride", "split", "text_field", "num_bins")},
        # The last tokens of what is read: those of another longest length are others.
        **({"targets": args.targets, "targets_end": args.max_tokens} if args.targets else {}),
        "piece_tokens": args.max_tokens if args.split else None,
        "data_split": args.data_split,
        "dtype": session.precision,
        "models": {task.label: [task.model, model_fingerprint(task.model), session.rope_theta] for task in tasks},
    }
    session.on_main(lambda: open_output(args.output, settings, FILES, args.overwrite))
    for task in tasks:
        _run_model(session, task, args, lengths)
        gc.collect()  # the weights of a model go before the next is loaded
    session.on_main(lambda: report(args.output, versions(), lengths))


@dataclass(frozen=True)
class _Task:
    """One model and the documents as its tokenizer cuts them."""

    model: str
    label: str
    documents: list[Document]
    config: Any


def _prepare(session: Session, model: str, label: str, args: argparse.Namespace) -> _Task:
    from easyctx.evals.encoding import TextEncoder

    tokenizer = load_tokenizer(model)
    check_models_tokenizer(f"--data {args.data}", str(args.data), tokenizer, model)
    documents = read_documents(
        args.data,
        TextEncoder(tokenizer),
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        max_documents=args.max_documents,
        split=args.split,
        text_field=args.text_field,
        data_split=args.data_split,
    )
    documents = with_labels(documents, lengths_of(args), window_of(args))
    session.say(f"{label}: {described(documents, args.data_split)}")
    config = load_config(session, model)
    check_lengths(session, label, config, lengths_of(args))
    check_ids(documents, config.get_text_config().vocab_size, model)
    return _Task(model, label, documents, config)


def window_of(args: argparse.Namespace) -> Window:
    return Window(args.window, args.stride, args.targets)


def with_labels(documents: list[Document], lengths: list[int], window: Window) -> list[Document]:
    """Those that have a label where the window scores tokens. Raises ValueError if none has."""

    def read(document: Document) -> slice:
        longest = max(length for length in lengths if length <= len(document.ids))
        ways = {PREFIX: slice(1, longest), SLIDING: slice(1, None), LAST: slice(-(window.targets or 1), None)}
        return ways[window.kind]

    found = [each for each in documents if each.scored is None or each.scored[read(each)].any()]
    if not found:
        first = min(documents, key=lambda each: len(each.ids))
        tokens = len(first.ids[read(first)])
        raise ValueError(
            f"no row has a label where its tokens are scored (of the shortest row's {len(first.ids)} tokens these are "
            f"{tokens}): give more --lengths, up to those of the rows, or more --targets"
        )
    return found


def described(documents: list[Document], data_split: str | None) -> str:
    """How many documents, tokens and, among these, tokens that are not scored."""
    text = f"{len(documents)} documents of {sum(len(each.ids) for each in documents)} tokens"
    unscored = sum(np.count_nonzero(~each.scored) for each in documents if each.scored is not None)
    if unscored:
        text += f", {unscored} of them without a label, which are read but not scored"
    return text + (f" (split {data_split})" if data_split else "")


def _run_model(session: Session, task: _Task, args: argparse.Namespace, lengths: list[int]) -> None:
    label, documents = task.label, task.documents
    rows_file = args.output / ROWS_FILE
    rows = session.on_main(lambda: [row for row in read_rows(rows_file, KEY) if row["model"] == label])
    done = {row["document_hash"] for row in rows if set(lengths) <= set(row["lengths"])}
    todo = [document for document in documents if document.hash not in done]
    if len(todo) < len(documents):
        session.say(f"{label}: {len(documents) - len(todo)} of {len(documents)} documents are done already")
    if todo:
        _score_documents(session, load_scorer(session, task.model, task.config), label, todo, args, lengths)


def check_ids(documents: list[Document], vocab_size: int, model: str) -> None:
    """Raises ValueError for token ids that the model does not know: rows tokenised for another one."""
    for document in documents:
        worst = int(document.ids.max() if document.ids.min() >= 0 else document.ids.min())
        if not 0 <= worst < vocab_size:
            raise ValueError(f"{document.name} holds token {worst}, but {model} knows 0 to {vocab_size - 1}")


def _score_documents(
    session: Session,
    scorer: Scorer,
    label: str,
    todo: list[Document],
    args: argparse.Namespace,
    lengths: list[int],
) -> None:
    from tqdm import tqdm

    # Engines that gather weights need the same number of forwards everywhere: equal lengths side by side.
    todo = sorted(todo, key=lambda document: -len(document.ids))
    progress = tqdm(total=len(todo), desc=f"perplexity {label}", unit="document", disable=not session.is_main)
    for document, counts in session.share(todo):
        row = score_document(scorer, document, lengths, window_of(args), args.num_bins)
        rows = session.gather([{"model": label, **row}] if counts else [])
        if session.is_main:
            append_rows(args.output / ROWS_FILE, rows)
        progress.update(len(rows))
    progress.close()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_main(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
