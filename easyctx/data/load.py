"""Load tokenised rows for the train loop, and check them before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from easyctx.data.rows import MIN_TOKENS
from easyctx.hub_names import why_no_hub_name

if TYPE_CHECKING:
    from datasets import Dataset

SCAN_TOKENS = 1 << 24


def load_tokenised(path_or_name: str | Path, split: str | None = None) -> Dataset:
    """Rows of a folder made by save_to_disk, or else of a hub dataset; `split` defaults to "train".

    Raises `ValueError` for what is neither, for a missing split or `input_ids` column, and for no rows.
    """
    name = str(path_or_name)
    path = Path(name).expanduser()
    dataset = load_folder(path, split) if path.exists() else _load_from_hub(name, path, split or "train")
    if "input_ids" not in dataset.column_names:
        columns = ", ".join(dataset.column_names) or "none"
        raise ValueError(
            f"dataset {name} has no input_ids column, its columns are {columns}: tokenise it with `easyctx data`"
        )
    if len(dataset) == 0:
        raise ValueError(f"dataset {name} has 0 rows: there is nothing to train on")
    return dataset


def load_folder(path: Path, split: str | None) -> Dataset:
    """What save_to_disk left in a folder, whatever its columns; of a DatasetDict one split, "train" for None.

    Raises `ValueError` for a folder without a dataset, without rows, or without that split.
    """
    import datasets

    way_out = f"make one with `easyctx data TEXT --tokenizer NAME --seq-length N --output {path}.tokens`"
    if not path.is_dir():
        raise ValueError(f"dataset {path} is a file, not a folder made by save_to_disk: {way_out}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"folder {path} holds no dataset made by save_to_disk: {way_out}") from None
    except IndexError:
        # datasets saves a dataset without rows as no shard at all, and then fails to load it.
        if any(path.rglob("*.arrow")):
            raise
        raise ValueError(f"dataset {path} has 0 rows: {way_out}") from None
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise ValueError(f"dataset {path} has no split {wanted!r}, its splits are {', '.join(loaded)}: name one")
        return loaded[wanted]
    if split not in (None, "train", str(loaded.split)):
        raise ValueError(f"dataset {path} has no splits, but split {split!r} was asked for: leave the split out")
    return loaded


def _load_from_hub(name: str, path: Path, split: str) -> Dataset:
    looked = f"there is no local folder {path.absolute()}"
    if reason := why_no_hub_name(name):
        raise ValueError(f"dataset {name}: {looked}, and {reason}")
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"dataset {name}: {looked}, and as a hub dataset (split {split!r}) it does not load: {reason}"
        ) from error


def row_lengths(dataset: Dataset) -> np.ndarray:
    """int64 [D]: the tokens of each row."""
    batches = _arrow_batches(dataset, 1 << 14)
    return np.concatenate([pc.list_value_length(ids).to_numpy(zero_copy_only=False) for ids in batches]).astype(int)


def check_rows(dataset: Dataset, seq_length: int, vocab_size: int, *, own_lengths: bool = False) -> None:
    """Check every row of `input_ids`, by whole Arrow arrays.

    Raises `ValueError` for a column that is not a flat list of integers, for a row shorter than
    `seq_length` (with `own_lengths`, than 2), and for a token id outside [0, vocab_size).
    """
    _check_type(dataset.features.arrow_schema.field("input_ids").type)
    least = MIN_TOKENS if own_lengths else seq_length
    shortest, shortest_row = least, -1
    start = 0
    for ids in _arrow_batches(dataset, seq_length):
        if ids.null_count:
            row = start + int(np.argmax(ids.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"row {row} of the dataset has no input_ids (null): leave that row out")
        lengths = pc.list_value_length(ids).to_numpy(zero_copy_only=False)
        if lengths.min() < shortest:
            shortest, shortest_row = int(lengths.min()), start + int(lengths.argmin())
        _check_ids(ids, lengths, start, vocab_size)
        start += len(ids)
    if shortest_row >= 0 and own_lengths:
        raise ValueError(f"row {shortest_row} of the dataset has {shortest} tokens: {least} are needed to predict one")
    if shortest_row >= 0:
        raise ValueError(
            f"the shortest row of the dataset, row {shortest_row}, has {shortest} tokens, but --seq-length is"
            f" {seq_length}: lower it to {shortest}, or tokenise again with"
            f" `easyctx data --seq-length {seq_length}`, or, for rows of different lengths, give --buckets 8"
        )


def _check_type(kind: pa.DataType) -> None:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"input_ids must be a list of integers in each row, but its type is {kind}")


def check_targets(dataset: Dataset, column: str, seq_length: int, lengths: np.ndarray | None = None) -> None:
    """Check `labels` (-100: no loss) or `loss_mask` (0: no loss) of every row.

    Raises `ValueError` for a row with fewer values than `seq_length` (with `lengths` int64 [D], another number than its
    own), and for one none of whose first `seq_length` tokens has something to predict, as when the response of an
    example was cut away.
    """
    nothing = 0 if column == "loss_mask" else -100
    start = 0
    for values in _arrow_batches(dataset, seq_length, column):
        flat = values.flatten().to_numpy(zero_copy_only=False)
        ends = np.cumsum(pc.list_value_length(values).to_numpy(zero_copy_only=False))
        for offset, row in enumerate(np.split(flat, ends[:-1])):
            if lengths is not None and len(row) != lengths[start + offset]:
                raise ValueError(
                    f"row {start + offset} of the dataset has {len(row)} {column} and {lengths[start + offset]} "
                    "input_ids: give each token one"
                )
            if lengths is None and len(row) < seq_length:
                raise ValueError(
                    f"row {start + offset} of the dataset has {len(row)} {column}, but --seq-length is {seq_length}: "
                    "give each token one"
                )
            # The label of each token's successor is its target, so the first label is nobody's.
            if (row[1 : seq_length + 1] == nothing).all():
                raise ValueError(
                    f"row {start + offset} of the dataset has no target in its first {seq_length} tokens (--seq-length)"
                    f": all its {column} there are {nothing}, so its response is empty or cut away. Raise --seq-length "
                    f"(the row has {len(row)} tokens), or leave the row out"
                )
        start += len(values)


def _arrow_batches(dataset: Dataset, seq_length: int, column: str = "input_ids") -> Iterator[pa.Array]:
    """A column in order (also after select or shuffle), some 16M tokens at a time."""
    rows = max(1, SCAN_TOKENS // max(seq_length, 1))
    for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=rows):
        yield from table.column(column).chunks


def _check_ids(ids: pa.Array, lengths: np.ndarray, start: int, vocab_size: int) -> None:
    flat = ids.flatten()
    if len(flat) == 0:
        return
    extremes = pc.min_max(flat).as_py()
    if flat.null_count == 0 and extremes["min"] >= 0 and extremes["max"] < vocab_size:
        return
    if flat.null_count:
        wrong = flat.is_null().to_numpy(zero_copy_only=False)
    else:
        values = flat.to_numpy(zero_copy_only=False)
        wrong = (values < 0) | (values >= vocab_size)
    index = int(np.argmax(wrong))
    row = start + int(np.searchsorted(np.cumsum(lengths), index, side="right"))
    raise ValueError(
        f"row {row} of the dataset has token id {flat[index].as_py()}, outside the model's vocabulary of"
        f" {vocab_size} (0 to {vocab_size - 1}): tokenise with the model's own tokenizer"
    )
