"""What is checked before a run is saved or gone on with: folders, disks, and whether it is the same run."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from easyctx.training import checkpoint_files as files
from easyctx.training.config import TrainConfig
from easyctx.training.progress import TrainingStopped
from easyctx.training.ranks import Ranks

CHECKPOINT_BYTES = 12  # a parameter and AdamW's two moments, in float32
WEIGHT_BYTES = 4
# With the values of runs from before there was a setting.
OF_ADAPTERS: dict[str, Any] = {
    "lora_r": 0,
    "lora_alpha": None,
    "lora_targets": None,
    "lora_train": [],
    "quantize": None,
    "double_quant": True,
    "optimizer": "adamw",
}
MUST_AGREE = ("seed", "seq_length", "num_rows", "rows_crc32", "rope_theta", "rope_factor", "pose_length", *OF_ADAPTERS)
OF_ROWS = {"num_rows": "the dataset has another number of rows", "rows_crc32": "the dataset's rows hold other tokens"}


def check_can_write(output_dir: str) -> None:
    """Write a small file where checkpoints and weights will go.

    Raises:
        ValueError: naming the folder, and what is wrong with it.
    """
    folder = _nearest_existing(output_dir)
    # Machines may share the folder, and number their processes alike.
    probe = folder / f"{files.PROBE}_{os.environ.get('RANK', '0')}_{os.getpid()}"
    try:
        files.write_durably(probe, "probe")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--output-dir {output_dir} cannot be written to ({error.strerror}: {folder}): name another folder"
        ) from error


def check_room(config: TrainConfig, num_trained: int, num_parameters: int, ranks: Ranks) -> None:
    """Look whether the disk holds the checkpoints that are to be kept, the one being written, and the weights.

    Raises:
        TrainingStopped: it does not, on any machine of the run.
    """
    checkpoints = config.keep_checkpoints + 1 if config.save_every else 0
    needed = num_trained * CHECKPOINT_BYTES * checkpoints + num_parameters * WEIGHT_BYTES
    free = min(ranks.gather(shutil.disk_usage(_nearest_existing(config.output_dir)).free))
    if free < needed:
        raise TrainingStopped(
            f"--output-dir {config.output_dir} has {free / 2**30:.1f} GiB free on its disk, and the run needs "
            f"{needed / 2**30:.1f} GiB: {checkpoints} checkpoints of {CHECKPOINT_BYTES} bytes a parameter and the "
            "weights. Make room, name another folder, or lower --keep-checkpoints"
        )


def check_shared(config: TrainConfig, ranks: Ranks) -> None:
    """Look whether all machines of a run see the same output folder, as its checkpoints need it.

    Raises:
        TrainingStopped: a rank does not see what rank 0 has written.
    """
    mark = Path(config.output_dir) / f".easyctx_seen_{ranks.gather(os.getpid())[0]}"
    if ranks.rank == 0:
        files.write_durably(mark, "")
    ranks.gather(None)
    blind = [rank for rank, sees in enumerate(ranks.gather(mark.exists())) if not sees]
    if ranks.rank == 0:
        mark.unlink()
    if blind:
        raise TrainingStopped(
            f"ranks {blind} do not see what rank 0 writes to --output-dir {config.output_dir}: name a folder on a disk "
            "that all machines share"
        )


def _nearest_existing(output_dir: str) -> Path:
    folder = Path(output_dir)
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def check_checkpoint(checkpoint: Path, config: TrainConfig, rows: Any) -> None:
    """Say what a run goes on with. All ranks must call it: they share the reading of the checksums.

    Raises:
        ValueError: a damaged checkpoint, or one of another run.
    """
    changed = check_same_run(checkpoint, config, rows)
    ranks = Ranks()
    wrong = [w for w in ranks.gather(files.check_contents(checkpoint, ranks.rank, ranks.size)) if w]
    if wrong:
        raise ValueError(wrong[0])
    if ranks.rank == 0:
        also = f", with {', '.join(changed)}" if changed else ""
        print(f"easyctx: goes on from {checkpoint}{also}", flush=True)


def check_same_run(checkpoint: Path, config: TrainConfig, rows: Any) -> list[str]:
    """What differs between a checkpoint's run and this one, in words.

    Raises:
        ValueError: they differ in what numbers the samples or makes the model, so that going on is not possible.
    """
    before = read_trainer(checkpoint)
    old, new = (
        facts["config"] | {name: facts.get(name) for name in OF_ROWS} for facts in (before, run_facts(config, rows))
    )
    for name in MUST_AGREE:
        was, now = (of_run.get(name, OF_ADAPTERS.get(name)) for of_run in (old, new))
        if was != now:
            what = OF_ROWS.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(
                f"{checkpoint} cannot be gone on with: {what} ({now} now, {was} in its run). Give "
                "what its run had, or start a new run from its weights with --model and a new --output-dir"
            )
    ignored = {"resume", "overwrite", "output_dir", *OF_ROWS}
    return [
        f"--{name.replace('_', '-')} {new[name]} (was {old[name]})"
        for name in sorted(old.keys() & new.keys() - ignored)
        if old[name] != new[name]
    ]


def run_facts(config: TrainConfig, rows: Any) -> dict[str, Any]:
    """What a checkpoint records of its run; of the rows, how many there are and a checksum of the first and the last.

    A dataset that was made again, from other text or in another order, often has as many rows as before.
    """
    ends = (rows[index]["input_ids"].numpy().tobytes() for index in (0, len(rows) - 1))
    return {"config": config.as_dict(), "num_rows": len(rows), "rows_crc32": zlib.crc32(b"".join(ends))}


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / files.TRAINER).read_text(encoding="utf-8")))
