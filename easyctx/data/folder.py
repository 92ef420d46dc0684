"""The output folder: checked before work starts, written beside its place, put there in one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

SUMMARY_NAME = "easyctx_data.json"
MADE_BY = "easyctx data"
# What save_to_disk writes, our summary, and what `datasets` caches in a folder that was mapped over.
OUR_FILES = re.compile(
    r"((train|validation)/)?(data-\d+-of-\d+\.arrow|cache-\w+\.arrow|state\.json|dataset_info\.json)"
    r"|train|validation|dataset_dict\.json|easyctx_data\.json|README\.md|document_lengths\.png"
)


def check_output(name: str, *, overwrite: bool) -> Path:
    """The resolved output path; `ValueError` if something is there that must not be replaced."""
    output = Path(name).expanduser().resolve()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        what = f"is below {there}, a file" if there != output else "is a file"
        raise ValueError(f"output {output} {what}: name a folder that does not exist yet")
    if not output.exists() or not any(output.iterdir()):
        return output
    if not overwrite:
        raise ValueError(f"output {output} exists and is not empty: name another folder, or pass --overwrite")
    _refuse_unless_ours(output)
    return output


def _refuse_unless_ours(output: Path) -> None:
    names = (entry.relative_to(output).as_posix() for entry in output.rglob("*"))
    foreign = sorted(name for name in names if not OUR_FILES.fullmatch(name))
    if foreign:
        raise ValueError(f"output {output} holds {foreign[0]!r}, which easyctx did not write: not overwritten")
    try:
        made_by = json.loads((output / SUMMARY_NAME).read_text(encoding="utf-8")).get("made_by")
    except (OSError, ValueError, AttributeError):
        made_by = None
    if made_by != MADE_BY:
        raise ValueError(f"output {output} is no dataset made by `easyctx data`: not overwritten, even if asked")


class StagedFolder:
    """A temporary folder beside `output`; gone at the end, but for what was put in place."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def __enter__(self) -> StagedFolder:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.partial-", dir=self.output.parent))
        self.dataset = self.scratch / "dataset"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def put_in_place(self, *, overwrite: bool) -> None:
        """Make the dataset folder durable and rename it to its final name; an old one goes only then."""
        for entry in self.dataset.rglob("*"):
            _fsync(entry)
        _fsync(self.dataset)
        old = self.scratch / "old"
        try:
            if overwrite and self.output.exists():
                if any(self.output.iterdir()):
                    _refuse_unless_ours(self.output)
                os.rename(self.output, old)
            os.rename(self.dataset, self.output)
        except BaseException:
            if old.exists() and not self.output.exists():
                os.rename(old, self.output)
            raise
        _fsync(self.output.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
