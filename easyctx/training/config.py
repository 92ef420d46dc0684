"""The train loop's one flat configuration, and the checks that need no model and no GPU."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easyctx.adapters.folder import check_model, config_source
from easyctx.adapters.prepare import adopt_adapter
from easyctx.adapters.settings import AdapterSettings, check_adapter_values
from easyctx.backend import OWN, check_backend, modes_of
from easyctx.cost.choose import AUTO, resolve_mode
from easyctx.modes import check_mode, get_mode
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
    buckets: int
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
    liger: bool
    lora_r: int
    lora_alpha: float | None
    lora_dropout: float
    lora_targets: list[str] | None
    lora_train: list[str]
    quantize: str | None
    double_quant: bool
    optimizer: str
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
    sample_every: int
    sample_prompts: str | None
    sample_tokens: int
    peak_tflops: float | None
    profile: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_config_values(config: TrainConfig, world_size: int) -> int:
    """Refuse what cannot work, before anything is loaded; returns the sequence-parallel degree.

    A parallel mode of "auto" is replaced by the mode that it stands for.

    Raises:
        ValueError: an impossible number, mode, degree or folder, with both values and the way out.
    """
    _check_numbers(config)
    check_model(config.model)
    adopt_adapter(config)
    if config.parallel_mode == AUTO:
        config.parallel_mode, config.ring_degree = resolve_mode(
            config_source(config.model),
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
    _check_what_is_kept(config)
    is_sequence_parallel = get_mode(config.parallel_mode).is_sequence_parallel
    check_adapter_values(AdapterSettings.from_config(config), config.optimizer, config.dtype, is_sequence_parallel)
    check_output_dir(config)
    check_watch_values(config)
    if config.tracker != "none":
        _check_tracker(config.tracker)
    return degree


def _check_numbers(config: TrainConfig) -> None:
    """ValueError for a number that cannot be, or that contradicts another."""
    for name in ("batch_size", "gradient_accumulate_every", "max_train_steps"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be at least 1")
    if config.seq_length < 2:
        raise ValueError(f"--seq-length is {config.seq_length}, and a sequence needs at least 2 tokens")
    if config.buckets < 0:
        raise ValueError(f"--buckets is {config.buckets}, and must be at least 0")
    if config.buckets and config.pose_length:
        raise ValueError(
            f"--buckets {config.buckets} is for rows of different lengths, and --pose-length {config.pose_length} "
            "spreads rows of one length: leave one of them out"
        )
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


def _check_what_is_kept(config: TrainConfig) -> None:
    """ValueError for memory flags that do not go with another package's attention, or with adapters' dropout."""
    if config.attn_backend != OWN:
        asked = {"--recompute": config.recompute, "--keep-attention": config.keep_attention}
        for name, value in asked.items():
            if value in ("keep-attention", "gpu", "host"):
                raise ValueError(
                    f"{name} {value} keeps what easyctx's own attention makes, and --attn-backend is "
                    f"{config.attn_backend}: leave it out, and attention runs again in the backward"
                )
    if config.lora_dropout and ((config.checkpoint_every or 1) > 1 or config.mlp_tile):
        flag = "--mlp-tile" if config.mlp_tile else "--checkpoint-every"
        raise ValueError(
            f"--lora-dropout is {config.lora_dropout:g}, whose random numbers would be others where {flag} "
            f"{config.mlp_tile or config.checkpoint_every} has parts made again: leave one of them out"
        )


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
        save_every=0,
        keep_checkpoints=1,
        max_skipped_steps=0,
        hang_timeout=0,
        eval_every=0,
        eval_rows=1,
        sample_every=0,
        sample_tokens=1,
    )
    for name, least in least_values.items():
        if (value := getattr(config, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be at least {least}")
    if bool(config.eval_every) != bool(config.eval_dataset):
        raise ValueError(
            f"--eval-every is {config.eval_every} and --eval-dataset {config.eval_dataset}: give both or neither"
        )
    if bool(config.sample_every) != bool(config.sample_prompts):
        raise ValueError(
            f"--sample-every is {config.sample_every} and --sample-prompts {config.sample_prompts}: give both or none"
        )
    if config.sample_every and config.sample_tokens >= config.seq_length:
        raise ValueError(
            f"--sample-tokens {config.sample_tokens} leave no room for a prompt in --seq-length {config.seq_length}: "
            "lower it"
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
