"""The files of a checkpoint: which are complete, which are damaged, and how they come to be and to go.

    OUTPUT_DIR/checkpoints/step_00000050/
        state/             weights and optimizer, written by torch.distributed.checkpoint
        random_00000.pt    random number generators of each rank
        trainer.json       step, samples seen, settings of the run
        complete.json      name, size and CRC-32 of all of these; written last

A folder is written as `step_00000050.partial` and renamed when all of it is on the disk.
"""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
STATE, TRAINER, COMPLETE = "state", "trainer.json", "complete.json"
PARTIAL = ".partial"
PROBE = ".easyctx_probe"  # begins the names of files that only try whether a folder can be written to
READ_BYTES = 1 << 24


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """The folders of finished checkpoints under `root`, oldest first."""
    return sorted(p for p in root.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit())


def file_record(folder: Path, name: str) -> dict[str, Any]:
    """Name, size in bytes and CRC-32 of a file of a checkpoint, put on the disk first."""
    checksum, size = 0, 0
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(READ_BYTES):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"name": name, "bytes": size, "crc32": checksum}


def write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, final: Path, records: list[dict[str, Any]]) -> None:
    """Make a fully written folder a checkpoint."""
    write_durably(partial / COMPLETE, json.dumps({"files": records}, indent=1) + "\n")
    for folder in (partial / STATE, partial):
        sync_folder(folder)
    os.replace(partial, final)
    sync_folder(final.parent)


def discard(folder: Path) -> None:
    """Remove a checkpoint so that, whenever this is cut short, no half of it looks like a whole one."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.deleted{PARTIAL}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside_later(checkpoint: Path) -> list[Path]:
    """Rename the checkpoints of later steps, which a run that goes on from this one leaves behind; their new names."""
    later = [p for p in step_folders(checkpoint.parent) if p.name > checkpoint.name]
    aside = []
    for folder in later:
        name = folder.with_name(f"{folder.name}.set_aside")
        shutil.rmtree(name, ignore_errors=True)
        os.replace(folder, name)
        aside.append(name)
    return aside


def prune(root: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    for folder in step_folders(root)[:-keep]:
        discard(folder)


def remove_partial(root: Path) -> None:
    """Remove what a run that was killed left half written."""
    for folder in root.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def find_checkpoint(output_dir: str, resume: str) -> Path | None:
    """The checkpoint that `--resume` means; None for "auto" in a folder that has none yet.

    Args:
        output_dir: of the run.
        resume: "auto" for its newest checkpoint, or a checkpoint's folder, or another run's output folder.

    Raises:
        ValueError: a folder without a checkpoint, a checkpoint that lacks files, weights without a checkpoint.
    """
    given = Path(output_dir if resume == "auto" else resume)
    if (given / COMPLETE).exists() or (given / TRAINER).exists():
        found = given
    else:
        root = given / CHECKPOINTS if (given / CHECKPOINTS).is_dir() else given
        candidates = step_folders(root)
        if not candidates:
            if resume == "auto" and not (given / "config.json").exists():
                return None
            if resume == "auto":
                raise ValueError(
                    f"--output-dir {output_dir} holds weights but no checkpoint to resume from: go on from the weights "
                    f"with --model {output_dir} and a new --output-dir, or begin anew with --overwrite"
                )
            raise ValueError(
                f"--resume {resume} holds no checkpoint: name a folder such as OUTPUT_DIR/{CHECKPOINTS}/step_00000050, "
                "or leave the name out to take the newest of --output-dir"
            )
        found = candidates[-1]
    check_sizes(found)
    return found


def read_records(checkpoint: Path) -> list[dict[str, Any]]:
    """The files that belong to a checkpoint; ValueError where that record itself is gone or broken."""
    try:
        return list(json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError):
        raise ValueError(damaged(checkpoint, f"its {COMPLETE} is missing or unreadable")) from None


def check_sizes(checkpoint: Path) -> None:
    """ValueError that names the first file which is missing or has not the size it was written with."""
    for record in read_records(checkpoint):
        path = checkpoint / record["name"]
        size = path.stat().st_size if path.exists() else None
        if size != record["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {record['bytes']:,}"
            raise ValueError(damaged(checkpoint, f"{record['name']} {what}"))


def check_contents(checkpoint: Path, rank: int, size: int) -> str | None:
    """Compare this rank's share of the files with their checksums; what is wrong, or None."""
    for record in read_records(checkpoint)[rank::size]:
        found = file_record(checkpoint, record["name"])
        if found != record:
            return damaged(checkpoint, f"{record['name']} has changed since it was written (its CRC-32 is another)")
    return None


def damaged(checkpoint: Path, what: str) -> str:
    before = [p for p in step_folders(checkpoint.parent) if p.name < checkpoint.name]
    way_out = f"the one before it is taken with --resume {before[-1]}" if before else "there is none before it"
    return f"the checkpoint {checkpoint} is damaged: {what}; {way_out}"
