"""Which files hold the text, and the records in them, in a fixed order."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
UTF8_BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 64  # read at a time

OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class Record:
    """One record: where it came from (`file`, `file:line`, `dataset:row`), and a text or named fields."""

    where: str
    content: str | dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One document: where it came from and its text."""

    where: str
    text: str


@dataclass
class BadRecords:
    """What to do with input that cannot be used: stop at the first, or skip, count and remember all."""

    skip: bool
    records: list[tuple[str, str]] = field(default_factory=list)

    def report(self, where: str, reason: str) -> None:
        """Remember a bad record; raises `ValueError` naming it unless bad records are skipped."""
        if not self.skip:
            raise ValueError(f"{where}: {reason}. Mend it, or leave such input out with --skip-bad")
        self.records.append((where, reason))


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files to read: the inputs in the order given, a folder's files sorted by path, hidden ones left out.

    Raises `ValueError` for an input that does not exist, that is or holds no file of a supported suffix,
    and for a file that is reached twice.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = _files_below(path)
        elif path.is_file():
            found = [path] if path.name.lower().endswith(SUFFIXES) else []
        elif path.exists():
            raise ValueError(f"input {name} is neither a file nor a folder: pass one of those")
        else:
            raise ValueError(f"input {name} does not exist (looked for {path.absolute()})")
        if not found:
            raise ValueError(f"input {name} is no supported file and holds none: expected {', '.join(SUFFIXES)}")
        files += found
    seen: set[Path] = set()
    for path in files:
        resolved = path.resolve()
        if resolved in seen:
            raise ValueError(f"{path} is reached twice: name each file or its folder, not both")
        seen.add(resolved)
    return files


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        usable = (name for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        found += [path for path in (Path(parent, name) for name in usable) if path.is_file()]
    return sorted(found)


def read_documents(files: Sequence[Path], *, text_field: str, bad: BadRecords, on_bytes: OnBytes) -> Iterator[Document]:
    """Yield every usable document of text files; what cannot be used goes to `bad`."""
    return documents_of(read_records(files, bad=bad, on_bytes=on_bytes), text_field, bad)


def documents_of(records: Iterator[Record], text_field: str, bad: BadRecords) -> Iterator[Document]:
    """The records' texts."""
    for record in records:
        try:
            text = text_of(record.content, text_field)
            check_text(text)
        except ValueError as error:
            bad.report(record.where, str(error))
        else:
            yield Document(record.where, text)


def read_records(files: Sequence[Path], *, bad: BadRecords, on_bytes: OnBytes) -> Iterator[Record]:
    """Yield every record; `on_bytes` is called with the bytes of the files read since the last call.

    Text is kept as it is in the file (line ends included) but for a byte-order mark. Blank lines of a JSONL
    file are no records. What cannot be read goes to `bad`, which may raise `ValueError`.
    """
    for path in files:
        told = 0
        with path.open("rb") as raw:
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw  # type: ignore[assignment]
            try:
                for record in _records_in(path, stream, bad):
                    on_bytes(raw.tell() - told)
                    told = raw.tell()
                    yield record
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                bad.report(str(path), f"broken gzip file, the rest of it cannot be read ({error})")
            except pa.ArrowException as error:
                bad.report(str(path), f"broken Parquet file, the rest of it cannot be read ({error})")
            on_bytes(path.stat().st_size - told)


def _records_in(path: Path, stream: IO[bytes], bad: BadRecords) -> Iterator[Record]:
    name = path.name.lower()
    empty = True
    for where, data in _parts(path, name, stream):
        empty = False
        try:
            if isinstance(data, bytes):
                text = data.removeprefix(UTF8_BOM).decode("utf-8")
                yield Record(where, text if name.endswith(TEXT_SUFFIXES) else _parse(text))
            else:
                yield Record(where, data)
        except UnicodeDecodeError as error:
            bad.report(where, f"not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start})")
        except ValueError as error:
            bad.report(where, str(error))
    if empty:
        bad.report(str(path), "empty file")


def _parts(path: Path, name: str, stream: IO[bytes]) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    if name.endswith(TEXT_SUFFIXES):
        yield str(path), stream.read()
    elif name.endswith(JSONL_SUFFIXES):
        # Bytes are split at \n only: str.splitlines would also cut at U+2028, which JSON strings may hold.
        for number, line in enumerate(stream, start=1):
            if line.removeprefix(UTF8_BOM).strip():
                yield f"{path}:{number}", line
    else:
        yield from _parquet_rows(path, stream)


def _parquet_rows(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=PARQUET_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row


def _parse(line: str) -> dict[str, Any]:
    try:
        record: Any = json.loads(line)
    except RecursionError:
        raise ValueError("broken JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"broken JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__} where an object is needed")
    return record


def text_of(content: str | dict[str, Any], text_field: str) -> str:
    """The text of a record; `ValueError` if it has none in that field."""
    if isinstance(content, str):
        return content
    if text_field not in content:
        names = ", ".join(map(repr, sorted(content))) or "none"
        raise ValueError(f"no field {text_field!r} (--text-field); the fields are {names}")
    text = content[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
    return text


def check_text(text: str) -> None:
    """ValueError for text that is empty or that no tokenizer can encode."""
    if not text.strip():
        raise ValueError("empty document")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate, which is no character") from None
