"""The train loop's one flat configuration, and the checks that need no model and no GPU."""

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easyctx.backend import BACKENDS, OWN, check_backend, modes_of
from easyctx.capability import check_model_path
from easyctx.cost.choose import AUTO, resolve_mode
from easyctx.kernel import KERNEL_CHOICES
from easyctx.modes import MODES, check_mode
from easyctx.training.checkpoint_files import PROBE

SCHEDULES = ("constant", "linear", "cosine")
RECOMPUTE = ("auto", "none", "keep-attention", "all")
LOSSES = ("auto", "full", "tiled")
DTYPES = ("auto", "float32", "bfloat16", "float64")
SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")
ROPE_SCALINGS = ("yarn",)
TRACKERS = ("tensorboard", "wandb", "none")


@dataclass
class TrainConfig:
    """All settings of a run; the flags of `python -m easyctx.train --help`, one to one."""

    model: str
    dataset: str
    output_dir: str
    batch_size: int
    gradient_accumulate_every: int
    max_train_steps: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    adam_betas: list[float]
    max_grad_norm: float
    seq_length: int
    pose_length: int | None
    rope_theta: float | None
    rope_scaling: str | None
    rope_factor: float | None
    parallel_mode: str
    sp_degree: int | None
    ring_degree: int | None
    attn_kernel: str
    attn_backend: str
    memory: str
    recompute: str
    keep_inputs: str
    keep_attention: str
    checkpoint_every: int | None
    mlp_tile: int | None
    tiled_norms: str
    head_groups: int | None
    gpu_memory: float | None
    host_memory: float | None
    loss: str
    dtype: str
    seed: int
    tracker: str
    wandb: str | None
    ignore_borders: bool
    overwrite: bool
    save_every: int
    resume: str | None
    keep_checkpoints: int
    sync_save: bool
    save_dtype: str
    max_shard_size: str
    max_skipped_steps: int
    hang_timeout: float
    eval_dataset: str | None
    eval_every: int
    eval_rows: int
    eval_lengths: list[int] | None
    peak_tflops: float | None
    profile: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_arguments(
    argv: list[str] | None = None, parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> TrainConfig:
    """The command line as a checked configuration. Unknown flags and bad values exit with status 2.

    That is the parser's `error`; a class with another one may be given.
    """
    parser = parser_class(
        prog="easyctx.train", description="Train a causal LM on sequences that are sharded over processes."
    )

    def flag(name: str, help: str, **kwargs: Any) -> None:
        names = {f"--{name}", f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}"}
        parser.add_argument(*sorted(names), dest=name.replace("-", "_"), help=help, **kwargs)

    flag("model", "folder or hub name of the model to start from", required=True)
    flag("dataset", "folder made by `easyctx data`, or a hub name; rows of `input_ids`", required=True)
    flag("output-dir", "folder for weights, tokenizer and logs; new or empty", required=True)
    flag("batch-size", "sequences to a micro-batch of one data-parallel rank", type=int, default=1)
    flag("gradient-accumulate-every", "micro-batches to an optimizer step", type=int, default=8)
    flag("max-train-steps", "optimizer steps", type=int, default=400)
    flag("learning-rate", "peak learning rate; its only source", type=float, default=2e-5)
    flag("lr-schedule", "course of the learning rate after the warm-up", choices=SCHEDULES, default="constant")
    flag("warmup-steps", "steps over which the learning rate rises linearly", type=int, default=0)
    flag("weight-decay", "AdamW's weight decay", type=float, default=0.1)
    flag("adam-betas", "AdamW's two betas", type=float, nargs=2, default=[0.9, 0.95])
    flag("max-grad-norm", "clip the global gradient norm to this; 0 does not clip", type=float, default=1.0)
    flag("seq-length", "tokens to a sequence, over all ranks that share it", type=int, default=16384)
    flag("pose-length", "PoSE: spread the positions of each row, with skips, over a range of so many", type=int)
    flag("rope-theta", "new RoPE base; also written into the saved config", type=float, default=None)
    flag("rope-scaling", "scale RoPE frequencies by this method, with --rope-factor", choices=ROPE_SCALINGS)
    flag("rope-factor", "how many times the length the model was made for the method is to reach", type=float)
    flag(
        "parallel_mode",
        "how attention is spread; auto takes the mode that is predicted to be fastest",
        choices=(AUTO, *MODES),
        default="data_parallel",
    )
    flag("sp-degree", "processes that share one sequence (default: all; the rest is data parallel)", type=int)
    flag("ring_degree", "how many of them form the ring, for usp_attn; the rest is Ulysses", type=int)
    flag(
        "attn-kernel",
        "attention kernel of the sequence-parallel modes",
        choices=KERNEL_CHOICES,
        default="auto",
    )
    flag(
        "attn-backend",
        "attention of another package, for comparison: ring_flash_attn (ring, zigzag, striped) or yunchang (Ulysses, "
        "USP)",
        choices=BACKENDS,
        default=OWN,
    )
    _memory_flags(flag)
    flag(
        "loss",
        "cross-entropy through full logits, or tile by tile of the head without ever holding them; auto tiles where "
        "they would take more than a gigabyte",
        choices=LOSSES,
        default="auto",
    )
    flag("dtype", "of the weights in training (auto: what the engine wants)", choices=DTYPES, default="auto")
    flag("seed", "seeds the shuffle of the data and everything else", type=int, default=42)
    flag(
        "tracker",
        "where metrics are logged besides the progress bar",
        choices=TRACKERS,
        default="tensorboard",
    )
    flag("wandb", "wandb project name; the same as --tracker wandb", default=None)
    flag("ignore-borders", "attend across the document borders that the dataset records", action="store_true")
    flag("overwrite", "write over the run in --output-dir", action="store_true")
    flag(
        "save-every",
        "steps between checkpoints; 0 writes one only when SIGTERM or SIGINT ends the run",
        type=int,
        default=0,
    )
    flag(
        "resume",
        "go on from a checkpoint: the newest of --output-dir, from the start where it has none, or that of a FOLDER",
        nargs="?",
        const="auto",
        metavar="FOLDER",
    )
    flag("keep-checkpoints", "how many of the newest to keep", type=int, default=2)
    flag("sync-save", "training waits for checkpoints; needs no copy of the state in host memory", action="store_true")
    flag("save-dtype", "of the weights in --output-dir (auto: as trained)", choices=SAVE_DTYPES, default="auto")
    flag("max-shard-size", "largest safetensors file of the weights", default="5GB")
    flag(
        "max-skipped-steps", "stop after more steps in a row whose loss or gradient is not finite", type=int, default=10
    )
    flag(
        "hang-timeout",
        "end the run when a step makes no headway for so many seconds; 0 never",
        type=float,
        default=1800.0,
    )
    flag(
        "eval-dataset",
        "rows whose perplexity is measured during training, as --dataset; of splits, validation",
        default=None,
    )
    flag("eval-every", "steps between these measurements", type=int, default=0)
    flag("eval-rows", "how many rows of --eval-dataset, from its first", type=int, default=16)
    flag("eval-lengths", "lengths to report (default: --seq-length, its half, … down to a 64th)", type=int, nargs="+")
    flag("peak-tflops", "of one GPU in bfloat16, for MFU (default: known for common GPUs)", type=float, default=None)
    flag("profile", "STEP:COUNT writes a torch.profiler trace of COUNT steps from step STEP", default=None)
    config = TrainConfig(**vars(parser.parse_args(argv)))
    if config.wandb:
        config.tracker = "wandb"
    return config


def _memory_flags(flag: Callable[..., None]) -> None:
    """Of `--memory auto`, each choice can be forced by its own flag."""
    flag(
        "memory",
        "auto decides what each layer keeps, and where, so that the sequence fits with the least to compute again; "
        "off leaves the model as it is. Without a GPU, auto is off unless one of the flags below is given",
        choices=("auto", "off"),
        default="auto",
    )
    flag(
        "recompute",
        "activations made again in the backward: none, all, or all but attention",
        choices=RECOMPUTE,
        default="auto",
    )
    flag("keep-inputs", "where layers' inputs are kept", choices=("auto", "gpu", "host"), default="auto")
    flag(
        "keep-attention",
        "where attention's results are kept, or that it runs again",
        choices=("auto", "gpu", "host", "recompute"),
        default="auto",
    )
    flag("checkpoint-every", "layers to a kept input; the inputs between are made again", type=int, default=None)
    flag("mlp-tile", "tokens of a tile of the MLP; 0 for all at once", type=int, default=None)
    flag("tiled-norms", "whether norms keep only their input", choices=("auto", "yes", "no"), default="auto")
    flag("head-groups", "groups of key/value heads that attention computes one by one", type=int, default=None)
    flag("gpu-memory", "GiB of each GPU to plan with (default: what is free)", type=float, default=None)
    flag("host-memory", "GiB of the machine's memory to plan with (default: what is free)", type=float, default=None)


def check_config_values(config: TrainConfig, world_size: int) -> int:
    """Refuse what cannot work, before anything is loaded; returns the sequence-parallel degree.

    A parallel mode of "auto" is replaced by the mode that it stands for.

    Raises:
        ValueError: an impossible number, mode, degree or folder, with both values and the way out.
    """
    for name in ("batch_size", "gradient_accumulate_every", "max_train_steps"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be at least 1")
    if config.seq_length < 2:
        raise ValueError(f"--seq-length is {config.seq_length}, and a sequence needs at least 2 tokens")
    if config.learning_rate <= 0:
        raise ValueError(f"--learning-rate is {config.learning_rate}, and must be positive")
    if config.rope_theta is not None and config.rope_theta <= 0:
        raise ValueError(f"--rope-theta is {config.rope_theta}, and must be positive")
    if (config.rope_scaling is None) != (config.rope_factor is None):
        raise ValueError(
            f"--rope-scaling is {config.rope_scaling} and --rope-factor {config.rope_factor}: give both or neither"
        )
    if config.rope_factor is not None and config.rope_factor < 1:
        raise ValueError(f"--rope-factor is {config.rope_factor}, and must be at least 1")
    if not 0 <= config.warmup_steps <= config.max_train_steps:
        raise ValueError(f"--warmup-steps is {config.warmup_steps}, outside 0 .. {config.max_train_steps} steps")
    for name, least in (("checkpoint_every", 1), ("head_groups", 1), ("mlp_tile", 0)):
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be at least {least}")
    for name in ("gpu_memory", "host_memory"):
        if (value := getattr(config, name)) is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value} GiB, and must be positive")
    if config.parallel_mode == AUTO:
        check_model_path(config.model)
        config.parallel_mode, config.ring_degree = resolve_mode(
            config.model,
            config.seq_length,
            world_size,
            config.sp_degree,
            config.ring_degree,
            batch=config.batch_size,
            kernel=config.attn_kernel,
            modes=modes_of(config.attn_backend),
        )
    degree = check_mode(config.parallel_mode, config.sp_degree, world_size, config.ring_degree)
    check_backend(config.attn_backend, config.parallel_mode, config.attn_kernel)
    if config.attn_backend != OWN:
        asked = {"--recompute": config.recompute, "--keep-attention": config.keep_attention}
        for name, value in asked.items():
            if value in ("keep-attention", "gpu", "host"):
                raise ValueError(
                    f"{name} {value} keeps what easyctx's own attention makes, and --attn-backend is "
                    f"{config.attn_backend}: leave it out, and attention runs again in the backward"
                )
    check_model_path(config.model)
    check_output_dir(config)
    check_watch_values(config)
    if config.tracker != "none":
        _check_tracker(config.tracker)
    return degree


def check_output_dir(config: TrainConfig) -> None:
    """ValueError if the folder holds anything and may neither be written over nor be gone on with."""
    output_dir, path = config.output_dir, Path(config.output_dir)
    if config.overwrite and config.resume:
        raise ValueError("--overwrite begins a run anew and --resume goes on with one: give one of them")
    if config.overwrite and path.exists() and Path(config.model).exists() and path.samefile(config.model):
        raise ValueError(
            f"--model and --output-dir are both {output_dir}, and --overwrite would write over the model that the run "
            "starts from: name another output folder"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file: name a folder")
    goes_on_here = config.resume == "auto" or (
        config.resume and path in (Path(config.resume), *Path(config.resume).parents)
    )
    # Other ranks may be trying just now whether they can write here.
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith(PROBE))[:3] if path.is_dir() else []
    if names and not (config.overwrite or goes_on_here):
        raise ValueError(
            f"--output-dir {output_dir} holds another run ({', '.join(names)}, …): name a new folder, go on with it "
            "by --resume, or give --overwrite"
        )


def check_watch_values(config: TrainConfig) -> None:
    """ValueError for settings of checkpoints, evaluation and profiling that cannot be."""
    least_values = dict(
        save_every=0, keep_checkpoints=1, max_skipped_steps=0, hang_timeout=0, eval_every=0, eval_rows=1
    )
    for name, least in least_values.items():
        if (value := getattr(config, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be at least {least}")
    if bool(config.eval_every) != bool(config.eval_dataset):
        raise ValueError(
            f"--eval-every is {config.eval_every} and --eval-dataset {config.eval_dataset}: give both or neither"
        )
    if config.eval_lengths and not all(2 <= length <= config.seq_length for length in config.eval_lengths):
        raise ValueError(f"--eval-lengths are {config.eval_lengths}, outside 2 .. {config.seq_length} (--seq-length)")
    if not re.fullmatch(r"\d+(KB|MB|GB|TB)", config.max_shard_size):
        raise ValueError(f"--max-shard-size is {config.max_shard_size}: give a number and a unit, such as 5GB")
    if config.profile is not None:
        profiled_steps(config.profile)


def profiled_steps(profile: str) -> range:
    """The steps of `--profile STEP:COUNT`, from 1; ValueError for anything else."""
    first, _, number = profile.partition(":")
    if not (first.isdigit() and number.isdigit() and int(first) and int(number)):
        raise ValueError(f"--profile is {profile}: give STEP:COUNT, such as 10:3 for steps 10, 11 and 12")
    return range(int(first), int(first) + int(number))


def _check_tracker(tracker: str) -> None:
    import importlib.util

    if importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--tracker {tracker} needs the package {tracker}: pip install {tracker}, or --tracker none")
