"""The rows on which easyctx.train extends the model: a `datasets` folder of `input_ids` and `labels`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train_scripts.quickstart.corpus import Text
from train_scripts.quickstart.samples import long_row

LONG_LENGTH = 2048
PROMPT_LENGTHS = (256, 512, 1024, 2048, 2048, 2048)  # the longest is the hardest, and gets half of the rows
NUM_ROWS = 960  # as many as the 480 steps of 2 take in quickstart.sh
NUM_TEXT_LABELS = 16  # about as many as digits


def make_long_rows(
    text: Text,
    seed: int,
    *,
    num_rows: int = NUM_ROWS,
    length: int = LONG_LENGTH,
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS,
) -> Iterator[dict[str, Any]]:
    """`num_rows` rows of `length` bytes; others for every seed."""
    rng = np.random.default_rng([seed, length])
    for _ in range(num_rows):
        yield long_row(text, rng, length, prompt_lengths, NUM_TEXT_LABELS)


def save_long_rows(text: Text, seed: int, folder: Path, num_rows: int = NUM_ROWS) -> None:
    """Writes `num_rows` rows beside `folder` and renames; an older one is removed."""
    from datasets import Dataset

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    Dataset.from_list(list(make_long_rows(text, seed, num_rows=num_rows))).save_to_disk(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
