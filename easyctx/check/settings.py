"""What a check is to do, and the refusal of what cannot work, before anything is built or spawned."""

from dataclasses import dataclass
from pathlib import Path

import torch

from easyctx.kernel import KERNEL_CHOICES
from easyctx.modes import MODES, check_mode, get_mode

HALF = ("bfloat16", "float16")
# Largest relative error; for half precision the largest multiple of one device's own error.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1.25, "float16": 1.25}
MAX_CPU_RANKS = 64
ROWS = 2  # sequences in a micro-batch of one data-parallel rank


@dataclass(frozen=True)
class CheckSettings:
    """The flags of `easyctx check --help`, one to one."""

    model: str
    parallel_mode: str
    sp: int
    dp: int = 1
    ring_degree: int | None = None
    layers: int = 2
    seq_length: int | None = None
    packed: bool = False
    dtype: str = "float64"
    steps: int = 2
    accumulate: int = 2
    attn_kernel: str = "auto"
    device: str = "auto"
    json: str | None = None
    seed: int = 0
    tolerance: float | None = None
    timeout: float = 600.0

    @property
    def world_size(self) -> int:
        return self.sp * self.dp

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def is_half(self) -> bool:
        return self.dtype in HALF

    @property
    def limit(self) -> float:
        return TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance


def check_settings(settings: CheckSettings) -> None:
    """Refuse what no model could be checked with.

    Raises:
        ValueError: an impossible number, mode, degree, kernel, dtype or file, with both values and the way out.
    """
    _check_numbers(settings)
    _check_mode(settings)
    if settings.dtype not in TOLERANCES:
        raise ValueError(f"unknown --dtype {settings.dtype!r}: choose one of {', '.join(TOLERANCES)}")
    if settings.attn_kernel not in KERNEL_CHOICES:
        raise ValueError(
            f"unknown attention kernel {settings.attn_kernel!r}: choose one of {', '.join(KERNEL_CHOICES)}"
        )
    if settings.seq_length is not None:
        check_length(settings.seq_length, settings.sp)
    if settings.json is not None:
        path = Path(settings.json)
        if path.is_dir() or not path.resolve().parent.is_dir():
            what = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
            raise ValueError(f"--json {settings.json} {what}: name a file in a folder that exists")


def check_length(seq_length: int, sp: int) -> None:
    """ValueError for sequences too short to give every rank a few tokens and the ragged masks something to hide."""
    shortest = max(16, 4 * sp)
    if seq_length < shortest:
        raise ValueError(
            f"--seq-length {seq_length} is too short for {sp} ranks to a sequence: {shortest} or more, "
            "or leave it out for a length that divides by nothing"
        )


def _check_numbers(settings: CheckSettings) -> None:
    for name in ("sp", "dp", "layers", "steps", "accumulate"):
        value = getattr(settings, name)
        if value < 1:
            raise ValueError(f"--{name} is {value}, and must be at least 1")
    if settings.tolerance is not None and not settings.tolerance > 0:
        raise ValueError(f"--tolerance is {settings.tolerance}, and must be positive")
    if not settings.timeout > 0:
        raise ValueError(f"--timeout is {settings.timeout}, and must be positive")


def _check_mode(settings: CheckSettings) -> None:
    mode, sp = get_mode(settings.parallel_mode), settings.sp
    if mode.is_sequence_parallel and sp == 1:
        raise ValueError(
            f"--sp is 1, but {mode.name} shares one sequence among 2 or more processes: "
            "--sp 2 or more, or --parallel_mode data_parallel"
        )
    check_mode(mode.name, sp, settings.world_size, settings.ring_degree)
    if settings.world_size == 1:
        raise ValueError(f"--dp is 1, and one process of {mode.name} would be compared with itself: --dp 2 or more")
    if settings.packed and not mode.is_sequence_parallel:
        raise ValueError(
            f"--packed is for sequence-parallel modes ({', '.join(n for n, m in MODES.items() if m.schedule)}): "
            f"in {mode.name} attention is the model's own"
        )
