"""From text files to a tokenised `datasets` folder."""

from __future__ import annotations

import json
import platform
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import easyctx
from easyctx.data.folder import MADE_BY, SUMMARY_NAME, StagedFolder, check_output
from easyctx.data.parallel import batch_pieces, encode_in_order
from easyctx.data.pieces import can_cut
from easyctx.data.rows import RowWriter
from easyctx.data.sources import BadRecords, find_files, read_documents
from easyctx.data.tokenizer import (
    BackendEncoder,
    BoundaryTokens,
    Encoder,
    choose_boundary_tokens,
    load_tokenizer,
    make_encoder,
    vocabulary_size,
)

NAMED_BAD_RECORDS = 1000  # in the summary file; the count is always whole
SHARD_BYTES = 500 << 20


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What `easyctx data` was asked for; `bos` and `eos` of None decide by the tokenizer."""

    inputs: tuple[str, ...]
    tokenizer: str
    seq_length: int
    output: str
    text_field: str = "text"
    borders: bool = False
    skip_bad: bool = False
    bos: bool | None = None
    eos: bool | None = None
    pad_last: bool = False
    overwrite: bool = False
    num_proc: int = 1


def build_dataset(settings: DataSettings) -> dict[str, Any]:
    """Tokenise the inputs into rows of `seq_length` tokens under `output`; returns the summary.

    Everything that can be wrong with the settings raises `ValueError` before any text is tokenised; a bad
    record does when it is reached, unless `skip_bad`. On any error nothing appears under `output`.
    """
    files, output = _check(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    boundary = choose_boundary_tokens(tokenizer, bos=settings.bos, eos=settings.eos)
    encoder = make_encoder(tokenizer)
    _print_plan(settings, len(files), tokenizer, boundary)
    bad = BadRecords(settings.skip_bad)
    started = time.perf_counter()
    with StagedFolder(output) as staged:
        arrow_file = staged.scratch / "rows.arrow"
        with RowWriter(arrow_file, settings.seq_length, borders=settings.borders, labels=settings.pad_last) as writer:
            documents = _write_documents(settings, files, encoder, boundary, bad, writer)
            left_over = writer.finish(_pad_id(tokenizer) if settings.pad_last else None)
        if writer.rows == 0:
            raise ValueError(
                f"{documents} documents give {writer.tokens} tokens, less than one row of --seq-length"
                f" {settings.seq_length}: pass more text, a smaller --seq-length, or --pad-last"
            )
        seconds = time.perf_counter() - started
        counts = {
            "files": len(files),
            "documents": documents,
            "tokens": writer.tokens,
            "rows": writer.rows,
            "dropped_tokens": 0 if settings.pad_last else left_over,
            "padding_tokens": left_over if settings.pad_last else 0,
            "bad_records": len(bad.records),
        }
        summary = _summary(settings, counts, bad, tokenizer, boundary, seconds)
        _save(arrow_file, staged.dataset, summary)
        staged.put_in_place(overwrite=settings.overwrite)
    return summary


def _check(settings: DataSettings) -> tuple[list[Path], Path]:
    if settings.seq_length < 2:
        raise ValueError(f"--seq-length {settings.seq_length}: a row needs 2 tokens at least to predict one")
    if settings.num_proc < 1:
        raise ValueError(f"--num-proc {settings.num_proc}: at least 1 process is needed")
    files = find_files(settings.inputs)
    return files, check_output(settings.output, overwrite=settings.overwrite)


def _print_plan(settings: DataSettings, num_files: int, tokenizer: Any, boundary: BoundaryTokens) -> None:
    print(f"{num_files} files -> rows of {settings.seq_length} tokens, tokenizer {settings.tokenizer}")
    for name, token_id, reason in (
        ("BOS before", boundary.bos_id, boundary.bos_reason),
        ("EOS after", boundary.eos_id, boundary.eos_reason),
    ):
        token = "none" if token_id is None else f"{tokenizer.convert_ids_to_tokens(token_id)} (id {token_id})"
        print(f"{name} each document: {token}; {reason}")
    if boundary.bos_id is None and boundary.eos_id is None:
        print("warning: nothing marks where one document ends and the next starts")


def _write_documents(
    settings: DataSettings,
    files: list[Path],
    encoder: Encoder,
    boundary: BoundaryTokens,
    bad: BadRecords,
    writer: RowWriter,
) -> int:
    """Feed every document to the writer; returns how many there were."""
    bos = np.array([token for token in [boundary.bos_id] if token is not None], dtype=np.int32)
    eos = np.array([token for token in [boundary.eos_id] if token is not None], dtype=np.int32)
    cut_long = isinstance(encoder, BackendEncoder) and can_cut(encoder.backend.to_str())
    total = sum(file.stat().st_size for file in files)
    documents = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising") as progress:
        read = read_documents(files, text_field=settings.text_field, bad=bad, on_bytes=progress.update)
        batches = batch_pieces(read, cut_long=cut_long)
        with closing(encode_in_order(batches, encoder, settings.num_proc)) as encoded:
            for piece, ids in encoded:
                if piece.first and piece.last and len(ids) == 0:
                    bad.report(piece.where, "gives no tokens")
                    continue
                parts = [bos] * piece.first + [ids] + [eos] * piece.last
                writer.add(np.concatenate(parts), documents)
                documents += piece.last
    return documents


def _pad_id(tokenizer: Any) -> int:
    """Any id does for padding, as its label is -100; the tokenizer's own where it has one."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token_id for token_id in candidates if token_id is not None)


def _summary(
    settings: DataSettings,
    counts: dict[str, int],
    bad: BadRecords,
    tokenizer: Any,
    boundary: BoundaryTokens,
    seconds: float,
) -> dict[str, Any]:
    import datasets
    import tokenizers
    import transformers

    return {
        "made_by": MADE_BY,
        "settings": asdict(settings),
        "counts": counts,
        "bad_records": [{"where": where, "reason": reason} for where, reason in bad.records[:NAMED_BAD_RECORDS]],
        "tokenizer": {
            "name": settings.tokenizer,
            "class": type(tokenizer).__name__,
            "vocabulary_size": vocabulary_size(tokenizer),
            "bos_id": boundary.bos_id,
            "eos_id": boundary.eos_id,
        },
        "seconds": round(seconds, 3),
        "tokens_per_second": round(counts["tokens"] / seconds),
        "versions": {
            "easyctx": easyctx.__version__,
            "python": platform.python_version(),
            "datasets": datasets.__version__,
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
        },
    }


def _save(arrow_file: Path, folder: Path, summary: dict[str, Any]) -> None:
    """Turn the Arrow file into a save_to_disk folder with the summary in it; no network, no cache."""
    import datasets

    dataset = datasets.Dataset.from_file(str(arrow_file))
    shards = min(len(dataset), -(-arrow_file.stat().st_size // SHARD_BYTES))
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset.save_to_disk(str(folder), num_shards=shards)
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
