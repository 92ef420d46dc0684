"""`easyctx data`: tokenise text files into rows of one length, for the train loop."""

from __future__ import annotations

import argparse
from typing import Any

PRINTED_BAD_RECORDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `easyctx data`."""
    parser.description = (
        "Tokenise text into a `datasets` folder whose rows have input_ids of one length: documents are"
        " joined, with BOS and EOS where the tokenizer has them, and cut into rows."
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="text (.txt, one document a file), JSON lines (.jsonl, one a line), the same as .gz, or a folder",
    )
    parser.add_argument("--tokenizer", required=True, metavar="NAME_OR_DIR", help="folder or hub name")
    parser.add_argument("--seq-length", type=int, required=True, metavar="N", help="tokens in each row")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSONL field (default: text)")
    parser.add_argument(
        "--borders",
        action="store_true",
        help="also write document_ids: which document of its row a token belongs to, from 0",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out, count and name broken JSON, missing or empty text and what is not UTF-8;"
        " without it the first is an error",
    )
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--bos", action=boolean, help="BOS before each document (default: as the tokenizer does)")
    parser.add_argument("--eos", action=boolean, help="EOS after each document (default: if the tokenizer has one)")
    last = parser.add_mutually_exclusive_group()
    last.add_argument(
        "--drop-last",
        dest="pad_last",
        action="store_false",
        help="drop the tokens that do not fill the last row (default)",
    )
    last.add_argument(
        "--pad-last",
        dest="pad_last",
        action="store_true",
        help="pad the last row, and write labels (-100 on the padding) for every row",
    )
    parser.set_defaults(pad_last=False)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that `easyctx data` made")
    parser.add_argument(
        "--num-proc",
        type=int,
        default=1,
        metavar="K",
        help="processes that tokenise (default: 1, where a fast tokenizer uses a thread a core)",
    )


def run(args: argparse.Namespace) -> int:
    """Build the dataset and print what it holds; raises `ValueError` for a user's mistake."""
    from easyctx.data.build import DataSettings, build_dataset

    summary = build_dataset(
        DataSettings(
            inputs=tuple(args.inputs),
            tokenizer=args.tokenizer,
            seq_length=args.seq_length,
            output=args.output,
            text_field=args.text_field,
            borders=args.borders,
            skip_bad=args.skip_bad,
            bos=args.bos,
            eos=args.eos,
            pad_last=args.pad_last,
            overwrite=args.overwrite,
            num_proc=args.num_proc,
        )
    )
    _print_summary(summary)
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    settings, counts = summary["settings"], summary["counts"]
    print(
        f"{settings['output']}: {counts['rows']:,} rows of {settings['seq_length']:,} tokens from"
        f" {counts['documents']:,} documents with {counts['tokens']:,} tokens"
        f" in {summary['seconds']:.1f} s ({summary['tokens_per_second']:,} tokens/s)"
    )
    if settings["pad_last"]:
        print(f"padding in the last row: {counts['padding_tokens']:,} tokens (labels -100)")
    else:
        print(f"dropped: {counts['dropped_tokens']:,} tokens that fill no row")
    print(f"vocabulary size: {summary['tokenizer']['vocabulary_size']:,}")
    if counts["bad_records"]:
        print(f"skipped: {counts['bad_records']:,} bad records")
        for record in summary["bad_records"][:PRINTED_BAD_RECORDS]:
            print(f"  {record['where']}: {record['reason']}")
        if counts["bad_records"] > PRINTED_BAD_RECORDS:
            named = min(counts["bad_records"], len(summary["bad_records"]))
            print(f"  ... the first {named:,} are named in easyctx_data.json")
