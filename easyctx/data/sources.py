"""Which files hold the text, and the documents in them, in a fixed order."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One document: where it came from (`file`, or `file:line` for JSONL) and its text."""

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


def read_documents(
    files: Sequence[Path], *, text_field: str, bad: BadRecords, on_bytes: Callable[[int], object]
) -> Iterator[Document]:
    """Yield every usable document; `on_bytes` is called with the bytes of the files read since the last call.

    Text is kept as it is in the file (line ends included) but for a byte-order mark. Blank lines of a JSONL
    file are no records. What cannot be used goes to `bad`, which may raise `ValueError`.
    """
    for path in files:
        told = 0
        with path.open("rb") as raw:
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw  # type: ignore[assignment]
            try:
                for document in _documents_in(path, stream, text_field, bad):
                    on_bytes(raw.tell() - told)
                    told = raw.tell()
                    yield document
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                bad.report(str(path), f"broken gzip file, the rest of it cannot be read ({error})")
            on_bytes(path.stat().st_size - told)


def _documents_in(path: Path, stream: IO[bytes], text_field: str, bad: BadRecords) -> Iterator[Document]:
    if path.name.lower().endswith(TEXT_SUFFIXES):
        records: Iterator[tuple[str, bytes]] = iter([(str(path), stream.read())])
    else:
        records = _jsonl_lines(path, stream)
    empty = True
    for where, data in records:
        empty = False
        try:
            text = data.removeprefix(UTF8_BOM).decode("utf-8")
            if path.name.lower().endswith(JSONL_SUFFIXES):
                text = _text_of_record(text, text_field)
            _check_text(text)
        except UnicodeDecodeError as error:
            bad.report(where, f"not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start})")
        except ValueError as error:
            bad.report(where, str(error))
        else:
            yield Document(where, text)
    if empty:
        bad.report(str(path), "empty file")


def _jsonl_lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    # Bytes are split at \n only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(stream, start=1):
        if line.removeprefix(UTF8_BOM).strip():
            yield f"{path}:{number}", line


def _text_of_record(line: str, text_field: str) -> str:
    try:
        record: Any = json.loads(line)
    except RecursionError:
        raise ValueError("broken JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"broken JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__} where an object is needed")
    if text_field not in record:
        names = ", ".join(map(repr, sorted(record))) or "none"
        raise ValueError(f"no field {text_field!r} (--text-field); the fields are {names}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
    return text


def _check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("empty document")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate, which is no character") from None
