"""A source opened for reading: its records one after the other, never all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyctx.data.folder import MADE_BY, SUMMARY_NAME
from easyctx.data.load import load_folder
from easyctx.data.mix import Source
from easyctx.data.sources import BadRecords, OnBytes, Record, find_files, read_records

BYTES_PER_ID = 4


@dataclass(frozen=True)
class OpenSource:
    """A source with its files, or with its dataset where it is a saved or hub one."""

    source: Source
    files: tuple[Path, ...] = ()
    dataset: Any = None

    @property
    def size(self) -> int | None:
        """Bytes to read, where they are known."""
        return sum(file.stat().st_size for file in self.files) if self.files else None

    def records(self, bad: BadRecords, on_bytes: OnBytes) -> Iterator[Record]:
        """Every record in order; `on_bytes` is told how far reading has come."""
        if self.dataset is None:
            yield from read_records(self.files, bad=bad, on_bytes=on_bytes)
            return
        for number, row in enumerate(self.dataset):
            on_bytes(sum(_size(value) for value in row.values()))
            yield Record(f"{self.source.path}:{number}", row)


def open_sources(sources: Sequence[Source]) -> list[OpenSource]:
    """Open all of them; `ValueError` for what does not exist, holds nothing, or is named twice."""
    local = [source for source in sources if source.kind == "files"]
    find_files([source.path for source in local])  # finds a file that two sources reach
    opened = []
    for source in sources:
        if source.kind == "files":
            opened.append(OpenSource(source, tuple(find_files([source.path]))))
        elif source.kind == "saved":
            opened.append(OpenSource(source, dataset=_saved(source)))
        else:
            opened.append(OpenSource(source, dataset=_from_hub(source)))
    names = [(source.path, source.config, source.split) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"source {name[0]} is named twice: name it once, with the sum of the weights")
    return opened


def _saved(source: Source) -> Any:
    dataset = load_folder(Path(source.path).expanduser(), source.split)
    if len(dataset) == 0:
        raise ValueError(f"source {source.path} has 0 rows: leave it out")
    # Ids come as arrays, not as a Python integer each.
    return dataset.with_format("numpy") if "input_ids" in dataset.column_names else dataset


def _from_hub(source: Source) -> Any:
    import datasets

    split = source.split or "train"
    try:
        return datasets.load_dataset(source.path, source.config, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"source {source.path} does not exist (looked for {Path(source.path).absolute()}), and as a hub dataset "
            f"(split {split!r}) it does not load: {reason}"
        ) from error


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return BYTES_PER_ID * len(value) if hasattr(value, "__len__") else 0


def card_of(path: str) -> dict[str, Any] | None:
    """The summary that `easyctx data` left in a dataset folder (beside its splits); None where there is none."""
    folder = Path(path).expanduser()
    for place in (folder, folder.parent):
        try:
            card = json.loads((place / SUMMARY_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(card, dict) and card.get("made_by") == MADE_BY:
            return card
    return None
