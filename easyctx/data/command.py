"""`easyctx data`: tokenise documents into rows of one length, for the train loop."""

from __future__ import annotations

import argparse
from typing import Any

PRINTED_BAD_RECORDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `easyctx data`."""
    parser.description = (
        "Tokenise documents into a `datasets` folder whose rows have input_ids of one length: documents are joined, "
        "with BOS and EOS where the tokenizer has them, and cut into rows, or packed whole with --pack. The folder "
        "gets a card (README.md) with what it is made of."
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="SOURCE[:WEIGHT]",
        help="text (.txt, one document a file), JSON lines (.jsonl), the same as .gz, Parquet, a folder of those, a "
        "tokenised folder, or a hub dataset; with a weight, its share of the tokens among all weights",
    )
    parser.add_argument("--tokenizer", required=True, metavar="NAME_OR_DIR", help="folder or hub name")
    parser.add_argument("--seq-length", "--seq_length", type=int, required=True, metavar="N", help="tokens in each row")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    _add_mix(parser)
    _add_rows(parser)
    _add_examples(parser)
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of a record (default: text)")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out, count and name broken JSON, missing or empty text and what is not UTF-8;"
        " without it the first is an error",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that `easyctx data` made")
    parser.add_argument(
        "--num-proc",
        type=int,
        metavar="K",
        help="processes that tokenise (default: up to one a core, for much text); the rows do not depend on it",
    )


def _add_mix(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which documents, how often, in what order")
    group.add_argument(
        "--mix", metavar="FILE", help="YAML or JSON with `sources`: path, weight, text_field, config, split, max_tokens"
    )
    group.add_argument("--tokens", type=int, metavar="N", help="training tokens in all, repeating or leaving out")
    group.add_argument("--long-from", type=int, metavar="N", help="documents of so many tokens are long, and are to be")
    group.add_argument("--long-share", type=float, metavar="S", help="... this share of each source's tokens")
    group.add_argument("--validation", type=float, default=0.0, metavar="SHARE", help="documents for a second split")
    group.add_argument("--shuffle", action="store_true", help="shuffle the documents (mixes are shuffled anyway)")
    group.add_argument("--seed", type=int, default=0, help="of the shuffle, the draw and the split (default: 0)")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    boolean = argparse.BooleanOptionalAction
    group = parser.add_argument_group("what a row holds")
    group.add_argument("--bos", action=boolean, help="BOS before each document (default: as the tokenizer does)")
    group.add_argument("--eos", action=boolean, help="EOS after each document (default: if the tokenizer has one)")
    group.add_argument(
        "--borders",
        action="store_true",
        help="also write document_ids: which document of its row a token belongs to, from 0",
    )
    group.add_argument(
        "--pack", action="store_true", help="cut no document that fits into a row; pads rows, records borders"
    )
    last = group.add_mutually_exclusive_group()
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


def _add_examples(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("supervised fine-tuning")
    group.add_argument(
        "--sft",
        action="store_true",
        help="records are examples: messages; prompt and response; or document, question and answer(s). Loss on the "
        "responses alone; what is too long loses the end of its document; packed as with --pack",
    )
    group.add_argument("--chat", action="store_true", help="put prompts and questions into the chat template too")
    group.add_argument(
        "--unpacked",
        action="store_true",
        help="each example is a row of its own length, up to --seq-length, unpadded: train with --buckets",
    )
    group.add_argument(
        "--max-source-tokens", type=int, metavar="N", help="of document and question together: the document is cut"
    )
    group.add_argument(
        "--max-target-tokens", type=int, metavar="N", help="of a response, which loses its end (default: never)"
    )


def run(args: argparse.Namespace) -> int:
    """Build the dataset and print what it holds; raises `ValueError` for a user's mistake."""
    from dataclasses import fields

    from easyctx.data.build import build_dataset
    from easyctx.data.settings import DataSettings

    given = vars(args) | {"inputs": tuple(args.inputs)}
    summary = build_dataset(DataSettings(**{field.name: given[field.name] for field in fields(DataSettings)}))
    _print_summary(summary)
    return 0


def _print_summary(summary: dict[str, Any]) -> None:
    settings, read = summary["settings"], summary["read"]
    print(
        f"read {read['documents']:,} documents with {read['tokens']:,} tokens in {summary['seconds']:.1f} s"
        f" ({summary['tokens_per_second']:,} tokens/s)"
    )
    for name, split in summary["splits"].items():
        length = f"{'up to ' * settings['unpacked']}{settings['seq_length']:,}"
        print(
            f"{settings['output']}{f'/{name}' * (len(summary['splits']) > 1)}: {split['rows']:,} rows of"
            f" {length} tokens from {split['documents']:,} documents with {split['tokens']:,} tokens"
        )
        if split["padding_tokens"] or settings["pad_last"]:
            where = "the last row" if settings["pad_last"] else "packed rows"
            print(f"padding in {where}: {split['padding_tokens']:,} tokens (labels -100)")
        if split["dropped_tokens"] or not settings["pad_last"]:
            print(f"dropped: {split['dropped_tokens']:,} tokens that fill no row")
    if len(summary["sources"]) > 1 or settings["long_from"] is not None or settings["tokens"] is not None:
        _print_sources(summary)
    if read.get("truncated_examples"):
        print(f"cut to fit a row: the documents of {read['truncated_examples']:,} examples")
    if read.get("cut_responses"):
        print(f"cut to fit --max-target-tokens: the responses of {read['cut_responses']:,} examples")
    print(f"vocabulary size: {summary['tokenizer']['vocabulary_size']:,}")
    _print_bad(summary)


def _print_sources(summary: dict[str, Any]) -> None:
    long_from = summary["settings"]["long_from"]
    for source in summary["sources"]:
        told = (
            f"  {source['path']}: {source['share_of_training']:.1%} of the training tokens, {source['passes']:.2f}"
            f" passes, each document at most {source['most_repeated']}x"
        )
        if long_from is not None:
            share = source["share_of_long"]
            told += f"; documents of {long_from:,} tokens and more: {share['read']:.1%} -> {share['train']:.1%}"
        print(told)


def _print_bad(summary: dict[str, Any]) -> None:
    count, named = summary["counts"]["bad_records"], summary["bad_records"]
    if not count:
        return
    print(f"skipped: {count:,} bad records")
    for record in named[:PRINTED_BAD_RECORDS]:
        print(f"  {record['where']}: {record['reason']}")
    if count > PRINTED_BAD_RECORDS:
        print(f"  ... the first {min(count, len(named)):,} are named in easyctx_data.json")
