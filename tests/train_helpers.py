"""A tiny model and dataset for runs of the train loop, and the command line of one."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset

from tests.data_helpers import save_plain_tokenizer
from tests.models import VOCAB, tiny_model

ROOT = Path(__file__).parent.parent
LENGTH, STEPS = 101, 3


def make_inputs(folder: Path, **overrides: int) -> Path:
    """A folder with `model` (tokenizer beside it) and `data`: 12 rows with ragged labels."""
    tiny_model("llama", torch.float32, **overrides).save_pretrained(folder / "model")
    save_plain_tokenizer(folder / "model")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (12, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).save_to_disk(folder / "data")
    return folder


def flags(inputs: Path, output: Path, **changes: object) -> list[str]:
    """The command line of a run; a value of None leaves a flag out, True gives it without a value."""
    settings: dict[str, object] = {
        "model": inputs / "model",
        "dataset": inputs / "data",
        "output-dir": output,
        "seq-length": LENGTH,
        "max-train-steps": STEPS,
        "batch-size": 2,
        "gradient-accumulate-every": 3,
        "learning-rate": 1e-2,
        "rope-theta": 1e5,
        "tracker": "none",
    }
    settings |= {name.replace("_", "-"): value for name, value in changes.items()}
    settings["parallel_mode"] = settings.pop("parallel-mode", "data_parallel")
    given = {f"--{name}": value for name, value in settings.items() if value is not None}
    return [part for name, value in given.items() for part in ((name,) if value is True else (name, str(value)))]


def launch(command: list[str], **environment: str) -> str:
    env = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    return done.stdout + done.stderr


def accelerate(config: str, arguments: list[str], *extra: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
    return [*launcher, "--main_process_port", "0", *extra, "-m", "easyctx.train", *arguments]
