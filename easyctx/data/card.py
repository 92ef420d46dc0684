"""The card of a data set: what it was made of, as JSON for programs, Markdown and a picture for people."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import easyctx
from easyctx.data.examples import ExampleEncoder
from easyctx.data.folder import MADE_BY, SUMMARY_NAME
from easyctx.data.lengths import length_bins, plot_lengths
from easyctx.data.plan import Plan
from easyctx.data.readers import OpenSource
from easyctx.data.settings import DataSettings
from easyctx.data.sources import BadRecords
from easyctx.data.store import Index

NAMED_BAD_RECORDS = 1000  # in the summary file; the count is always whole
PICTURE_NAME = "document_lengths.png"


def document_counts(index: Index, documents: np.ndarray) -> dict[str, int]:
    """Of documents (numbers, with repetitions)."""
    return {"documents": len(documents), "tokens": int(index.lengths[documents].sum())}


def describe(
    settings: DataSettings,
    sources: list[OpenSource],
    index: Index,
    plan: Plan,
    written: dict[str, dict[str, Any]],
    bad: BadRecords,
    tokenizer: dict[str, Any],
    examples: ExampleEncoder | None,
    seconds: float,
) -> dict[str, Any]:
    """The summary, ready for JSON. `counts` are those of the training rows."""
    num_files = sum(len(source.files) for source in sources)
    read = document_counts(index, np.arange(len(index.lengths)))
    return {
        "made_by": MADE_BY,
        "settings": asdict(settings),
        "counts": {"files": num_files, **written["train"], "bad_records": len(bad.records)},
        "read": read | _cuts(examples),
        "splits": written,
        "sources": [_source(number, source, settings, index, plan) for number, source in enumerate(sources)],
        "lengths": length_bins(index, plan, len(sources)),
        "bad_records": [{"where": where, "reason": reason} for where, reason in bad.records[:NAMED_BAD_RECORDS]],
        "tokenizer": tokenizer,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(read["tokens"] / seconds),
        "versions": _versions(),
    }


def _cuts(examples: ExampleEncoder | None) -> dict[str, int]:
    if examples is None:
        return {}
    return {"truncated_examples": examples.truncated, "cut_responses": examples.cut_responses}


def _source(number: int, source: OpenSource, settings: DataSettings, index: Index, plan: Plan) -> dict[str, Any]:
    """What was read of a source and what of it was written."""
    everything = np.flatnonzero(index.sources == number)
    train = plan.train[index.sources[plan.train] == number]
    validation = plan.validation[index.sources[plan.validation] == number]
    all_tokens = int(index.lengths[plan.train].sum())
    described: dict[str, Any] = {
        "path": source.source.path,
        "weight": source.source.weight,
        "read": document_counts(index, everything),
        "train": document_counts(index, train),
        "validation": document_counts(index, validation),
    }
    for_training = described["read"]["tokens"] - described["validation"]["tokens"]
    described["share_of_training"] = described["train"]["tokens"] / all_tokens
    described["passes"] = described["train"]["tokens"] / for_training
    described["most_repeated"] = int(np.unique(train, return_counts=True)[1].max())
    if settings.long_from is not None:
        described["share_of_long"] = {
            "read": _share_of_long(index.lengths[everything], settings.long_from),
            "train": _share_of_long(index.lengths[train], settings.long_from),
        }
    return described


def _share_of_long(lengths: np.ndarray, long_from: int) -> float:
    return float(lengths[lengths >= long_from].sum() / lengths.sum())


def _versions() -> dict[str, str]:
    import datasets
    import tokenizers
    import transformers

    return {
        "easyctx": easyctx.__version__,
        "python": platform.python_version(),
        "datasets": datasets.__version__,
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
    }


def write_card(folder: Path, summary: dict[str, Any]) -> None:
    """The JSON file, README.md and the picture."""
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot_lengths(folder / PICTURE_NAME, summary)
    (folder / "README.md").write_text(markdown(summary), encoding="utf-8")


def markdown(summary: dict[str, Any]) -> str:
    """The card for people."""
    settings, tokenizer, counts = summary["settings"], summary["tokenizer"], summary["counts"]
    if settings["unpacked"]:
        how = "each a row of its own length"
    elif settings["pack"] or settings["sft"]:
        how = "whole documents packed into padded rows"
    else:
        how = "joined and cut into rows"
    lines = [
        f"# Rows of {'up to ' * settings['unpacked']}{settings['seq_length']:,} tokens",
        "",
        f"Made by `easyctx data` {summary['versions']['easyctx']}: documents {how}"
        f"{', loss on responses only' * settings['sft']}. Seed {settings['seed']}. Tokenizer `{tokenizer['name']}` "
        f"({tokenizer['class']}, {tokenizer['vocabulary_size']:,} ids, vocabulary {tokenizer['fingerprint']}); BOS "
        f"{tokenizer['bos_id']}, EOS {tokenizer['eos_id']}.",
        "",
        "| split | documents | tokens | rows | dropped tokens | padding tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("documents", "tokens", "rows", "dropped_tokens", "padding_tokens")
    for name, split in summary["splits"].items():
        lines.append(f"| {name} | " + " | ".join(f"{split[key]:,}" for key in keys) + " |")
    lines += ["", *_source_table(summary), ""]
    lines.append(f"Left out: {counts['bad_records']:,} bad records.")
    if (truncated := summary["read"].get("truncated_examples")) is not None:
        lines.append(f"Cut: the documents of {truncated:,} examples, to fit a row.")
    if cut := summary["read"].get("cut_responses"):
        lines.append(f"Cut: the responses of {cut:,} examples, to {settings['max_target_tokens']:,} tokens.")
    lines += ["", f"![share of tokens by length of their document]({PICTURE_NAME})", ""]
    return "\n".join(lines)


def _source_table(summary: dict[str, Any]) -> list[str]:
    long_from = summary["settings"]["long_from"]
    head = ["source", "weight", "documents read", "tokens read", "tokens in training", "share", "passes"]
    head += ["validation documents"]
    head += [f"share of documents >= {long_from:,} tokens: read, in training"] if long_from is not None else []
    table = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for source in summary["sources"]:
        cells = [
            f"`{source['path']}`",
            "" if source["weight"] is None else f"{source['weight']:g}",
            f"{source['read']['documents']:,}",
            f"{source['read']['tokens']:,}",
            f"{source['train']['tokens']:,}",
            f"{source['share_of_training']:.1%}",
            f"{source['passes']:.2f}",
            f"{source['validation']['documents']:,}",
        ]
        if long_from is not None:
            share = source["share_of_long"]
            cells.append(f"{share['read']:.1%}, {share['train']:.1%}")
        table.append("| " + " | ".join(cells) + " |")
    return table
