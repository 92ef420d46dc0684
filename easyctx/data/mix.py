"""The sources of a data set: what each is, its weight, and how it is named on the command line or in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from easyctx.hub_names import why_no_hub_name

SAVED_DATASET = ("state.json", "dataset_dict.json")  # what save_to_disk leaves
WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of documents.

    path: files or a folder of text, a folder made by save_to_disk, or a hub dataset's name.
    weight: its part of the mix, relative to the others'; None for what it holds.
    text_field: the field of a record that holds its text; None for --text-field.
    config, split: of a hub dataset or a saved DatasetDict; the split defaults to "train".
    max_tokens: stop reading it after the document with which it has given as many.
    """

    path: str
    weight: float | None = None
    text_field: str | None = None
    config: str | None = None
    split: str | None = None
    max_tokens: int | None = None

    @property
    def kind(self) -> str:
        """ "files", "saved" (by save_to_disk) or "hub"."""
        local = Path(self.path).expanduser()
        if local.is_dir() and any((local / name).exists() for name in SAVED_DATASET):
            return "saved"
        return "hub" if not local.exists() and why_no_hub_name(self.path) is None else "files"


def parse_inputs(inputs: Sequence[str]) -> list[Source]:
    """Sources from `PATH` or `PATH:WEIGHT`; a path that exists is never read as one with a weight."""
    sources = []
    for text in inputs:
        match = None if Path(text).expanduser().exists() else WEIGHTED.fullmatch(text)
        weight = float(match["weight"]) if match else None
        sources.append(Source(path=match["path"] if match else text, weight=weight))
    return sources


def read_mix(file: str) -> list[Source]:
    """Sources from a YAML or JSON file: `sources:`, a list of objects with the fields of `Source`.

    Paths are relative to the working folder. Raises ValueError naming the file and what is wrong in it.
    """
    import yaml  # accelerate and transformers need it too

    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"--mix {file} is no file: give a YAML or JSON file with a list of `sources`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--mix {file} is neither YAML nor JSON: {error}") from error
    listed = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed or set(content) != {"sources"}:
        raise ValueError(f"--mix {file} must hold `sources:`, a list of objects such as {{path: books/, weight: 0.5}}")
    return [_source(entry, f"--mix {file}, source {number}") for number, entry in enumerate(listed, start=1)]


def _source(entry: Any, where: str) -> Source:
    known = {field.name: field.type for field in fields(Source)}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{where} has no `path`")
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"{where} has {', '.join(map(str, unknown))}, which is none of {', '.join(known)}")
    for name, value in entry.items():
        numeric = {"weight": (int, float), "max_tokens": (int,)}.get(name)
        if not isinstance(value, numeric or str) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} is {value!r}, which is no {'number' if numeric else 'text'}")
    return Source(**entry)


def check_sources(sources: Sequence[Source]) -> None:
    """ValueError for no source at all, weights that are not positive or that only some sources have, and limits
    below one token."""
    if not sources:
        raise ValueError("no source of text: name files, folders or hub datasets, or a --mix file")
    for source in sources:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise ValueError(
                f"source {source.path} has the weight {source.weight:g}, which is not positive: leave the source out, "
                "or give it a weight above 0"
            )
        if source.max_tokens is not None and source.max_tokens < 1:
            raise ValueError(f"source {source.path} has max_tokens {source.max_tokens}, and must give 1 at least")
    without = [source.path for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        weighted = next(source for source in sources if source.weight is not None)
        raise ValueError(
            f"source {weighted.path} has a weight ({weighted.weight:g}) and {without[0]} has none: give all of them "
            "one, or none"
        )
