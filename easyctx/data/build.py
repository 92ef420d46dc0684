"""From sources of documents to a folder of tokenised rows: read, plan, write, describe."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from easyctx.data.card import describe, document_counts, write_card
from easyctx.data.examples import ExampleEncoder
from easyctx.data.folder import StagedFolder
from easyctx.data.packing import Stretch, pack
from easyctx.data.parallel import EncoderPool, choose_num_proc
from easyctx.data.plan import make_plan
from easyctx.data.readers import OpenSource
from easyctx.data.reading import Tools, fill_store
from easyctx.data.rows import OwnLengthWriter, RowWriter
from easyctx.data.segments import SegmentEncoder
from easyctx.data.settings import DataSettings, check_settings
from easyctx.data.sources import BadRecords
from easyctx.data.store import DocumentStore, Index
from easyctx.data.tokenised import check_same_tokenizer, fingerprint
from easyctx.data.tokenizer import (
    BoundaryTokens,
    choose_boundary_tokens,
    load_tokenizer,
    make_encoder,
    vocabulary_size,
)

READ_TOKENS = 1 << 20  # of a document at a time


def build_dataset(settings: DataSettings) -> dict[str, Any]:
    """Tokenise the sources into rows of `seq_length` tokens under `output`; returns the summary.

    Everything that can be wrong with the settings raises `ValueError` before any text is tokenised; a bad
    record does when it is reached, unless `skip_bad`. On any error nothing appears under `output`.
    """
    sources, output = check_settings(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    boundary = choose_boundary_tokens(tokenizer, bos=settings.bos, eos=settings.eos)
    identity = _identity(settings, tokenizer, boundary)
    warnings = _check_tokenised(sources, settings.tokenizer, identity["fingerprint"])
    examples = _example_encoder(settings, tokenizer, boundary) if settings.sft else None
    encoder = make_encoder(tokenizer)
    _print_plan(settings, sources, tokenizer, boundary, warnings)
    bad = BadRecords(settings.skip_bad)
    started = time.perf_counter()
    with StagedFolder(output) as staged, DocumentStore(staged.scratch / "documents", settings.seed) as store:
        with EncoderPool(encoder, _num_proc(settings, sources)) as pool:
            cut_long = isinstance(encoder, SegmentEncoder)
            tools = Tools(settings, boundary, identity["vocabulary_size"], cut_long, pool, examples, bad)
            fill_store(store, sources, tools)
        index = store.index()
        plan = make_plan(
            index, [source.source.path for source in sources], settings.wishes([s.source for s in sources])
        )
        pad_id = _pad_id(tokenizer)
        splits = {"train": plan.train} | ({"validation": plan.validation} if settings.validation else {})
        written = {}
        for name, documents in splits.items():
            folder = staged.dataset / name if len(splits) > 1 else staged.dataset
            written[name] = _write_split(folder, name, store, index, documents, settings, pad_id)
        if len(splits) > 1:
            (staged.dataset / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}), encoding="utf-8")
        summary = describe(
            settings, sources, index, plan, written, bad, identity, examples, time.perf_counter() - started
        )
        write_card(staged.dataset, summary)
        staged.put_in_place(overwrite=settings.overwrite)
    return summary


def _example_encoder(settings: DataSettings, tokenizer: Any, boundary: BoundaryTokens) -> ExampleEncoder:
    limits = (settings.max_source_tokens, settings.max_target_tokens)
    return ExampleEncoder(tokenizer, boundary, settings.seq_length, settings.chat, *limits)


def _identity(settings: DataSettings, tokenizer: Any, boundary: BoundaryTokens) -> dict[str, Any]:
    return {
        "name": settings.tokenizer,
        "class": type(tokenizer).__name__,
        "vocabulary_size": vocabulary_size(tokenizer),
        "fingerprint": fingerprint(tokenizer),
        "bos_id": boundary.bos_id,
        "eos_id": boundary.eos_id,
    }


def _check_tokenised(sources: list[OpenSource], name: str, own: str) -> list[str]:
    """Warnings about sources that are tokenised already; `ValueError` for one of another tokenizer."""
    tokenised = [s for s in sources if s.dataset is not None and "input_ids" in (s.dataset.column_names or [])]
    return [warning for s in tokenised if (warning := check_same_tokenizer(s.source.path, name, own)) is not None]


def _num_proc(settings: DataSettings, sources: list[OpenSource]) -> int:
    if settings.num_proc is not None:
        return settings.num_proc
    sizes = [source.size for source in sources if source.source.kind != "saved"]
    return choose_num_proc(None if None in sizes else sum(size or 0 for size in sizes))


def _print_plan(
    settings: DataSettings, sources: list[OpenSource], tokenizer: Any, boundary: BoundaryTokens, warnings: list[str]
) -> None:
    num_files = sum(len(source.files) for source in sources)
    others = len([source for source in sources if not source.files])
    what = f"{num_files} files" + (f" and {others} datasets" if others else "")
    length = f"{'up to ' * settings.unpacked}{settings.seq_length}"
    print(f"{what} -> rows of {length} tokens, tokenizer {settings.tokenizer}")
    if not settings.chat:
        for name, token_id, reason in (
            ("BOS before", boundary.bos_id, boundary.bos_reason),
            ("EOS after", boundary.eos_id, boundary.eos_reason),
        ):
            token = "none" if token_id is None else f"{tokenizer.convert_ids_to_tokens(token_id)} (id {token_id})"
            print(f"{name} each document: {token}; {reason}")
        if boundary.bos_id is None and boundary.eos_id is None:
            print("warning: nothing marks where one document ends and the next starts")
    for warning in warnings:
        print(warning)


def _write_split(
    folder: Path,
    name: str,
    store: DocumentStore,
    index: Index,
    documents: np.ndarray,
    settings: DataSettings,
    pad_id: int,
) -> dict[str, Any]:
    """Write the rows of a split; returns its counts."""
    labels = settings.sft or settings.packs or settings.pad_last or store.has_unlearnt
    kind = OwnLengthWriter if settings.unpacked else RowWriter
    with kind(folder, settings.seq_length, borders=settings.borders or settings.packs, labels=labels) as writer:
        write = _write_packed if settings.packs else _write_joined
        total = int(index.lengths[documents].sum())
        with tqdm(total=total, unit="tok", unit_scale=True, desc=f"writing {name}") as bar:
            write(writer, store, index, documents, pad_id, bar)
        dropped = total - writer.tokens + writer.finish(pad_id if settings.pad_last else None)
    if writer.rows == 0:
        what = f"{len(documents)} {'validation ' * (name == 'validation')}documents"
        raise ValueError(
            f"{what} give {writer.tokens} tokens, less than one row of --seq-length {settings.seq_length}: pass more "
            "text, a smaller --seq-length, or --pad-last"
        )
    writer.save()
    return {
        **document_counts(index, documents),
        "rows": writer.rows,
        "dropped_tokens": dropped,
        "padding_tokens": writer.padding,
    }


def _write_joined(
    writer: RowWriter, store: DocumentStore, index: Index, documents: np.ndarray, pad_id: int, bar: Any
) -> None:
    for number, document in enumerate(documents):
        length = int(index.lengths[document])
        for start in range(0, length, READ_TOKENS):
            writer.add(store.read(document, start, min(READ_TOKENS, length - start)), number)
        bar.update(length)


def _write_packed(
    writer: RowWriter, store: DocumentStore, index: Index, documents: np.ndarray, pad_id: int, bar: Any
) -> None:
    number = 0
    lengths = ((int(document), int(index.lengths[document])) for document in documents)
    for row in pack(lengths, writer.seq_length):
        for stretch in row:
            _add_stretch(writer, store, stretch, number)
            number += 1
        filled = sum(stretch.count for stretch in row)
        if filled < writer.seq_length:
            writer.pad(writer.seq_length - filled, pad_id, number)
            number += 1
        bar.update(filled)


def _add_stretch(writer: RowWriter, store: DocumentStore, stretch: Stretch, number: int) -> None:
    for start in range(0, stretch.count, READ_TOKENS):
        count = min(READ_TOKENS, stretch.count - start)
        writer.add(store.read(stretch.document, stretch.start + start, count), number)


def _pad_id(tokenizer: Any) -> int:
    """Any id does for padding, as its label is -100; the tokenizer's own where it has one."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token_id for token_id in candidates if token_id is not None)
