"""Reading of haystacks and documents. Every mistake is named before a model is loaded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")


def files_under(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """`path` itself, or the files with these suffixes below it in sorted order."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(suffixes))
    if not found:
        raise ValueError(f"{path} holds no file that ends in {' or '.join(suffixes)}")
    return found


def read_text(file: Path) -> str:
    """The whole file as UTF-8, unpacked where it ends in .gz."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is not a whole gzip file: {error}") from error


def read_haystack(path: Path) -> str:
    """All .txt (or .txt.gz) files of a folder in sorted order, or one file, joined by blank lines."""
    texts = [read_text(file).strip() for file in files_under(path, TEXT_SUFFIXES)]
    joined = "\n\n".join(text for text in texts if text)
    if not joined:
        raise ValueError(f"{path} holds only empty text")
    return joined


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file} line {number} is a {type(row).__name__}, not an object")
        yield number, row
