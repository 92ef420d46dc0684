"""What a run asks for of adapters and quantised weights, and the refusal of what cannot work, before a model loads."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator, DistributedType

from easyctx.engine import engine_name

LORA_TRAIN = ("embeddings", "norms")
QUANTIZE = ("nf4",)
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon")
INSTALL = 'pip install "easyctx[lora]"'


@dataclass(frozen=True)
class AdapterSettings:
    """The flags of the same names; lora_r is 0 where all weights are trained."""

    lora_r: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    lora_train: tuple[str, ...] = ()
    quantize: str | None = None
    double_quant: bool = True

    @classmethod
    def from_config(cls, config: Any) -> AdapterSettings:
        """Of a `TrainConfig`, or anything with its fields of these names."""
        targets = config.lora_targets
        return cls(
            lora_r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            lora_targets=tuple(targets) if targets else None,
            lora_train=tuple(config.lora_train),
            quantize=config.quantize,
            double_quant=config.double_quant,
        )

    @property
    def is_on(self) -> bool:
        return self.lora_r > 0

    @property
    def alpha(self) -> float:
        """What B A is scaled by, times r; by itself r, so that it is added as it is."""
        return float(self.lora_r if self.lora_alpha is None else self.lora_alpha)


def check_adapter_values(settings: AdapterSettings, optimizer: str, dtype: str, is_sequence_parallel: bool) -> None:
    """Refuse settings that contradict each other, or whose package is not there.

    Raises:
        ValueError: with both values and the way out.
    """
    if settings.lora_r < 0:
        raise ValueError(f"--lora-r is {settings.lora_r}: give a rank of at least 1, or 0 to train all weights")
    if settings.lora_alpha is not None and settings.lora_alpha <= 0:
        raise ValueError(f"--lora-alpha is {settings.lora_alpha:g}, and must be positive")
    if not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"--lora-dropout is {settings.lora_dropout:g}, outside 0 .. 1")
    if settings.lora_dropout and is_sequence_parallel:
        raise ValueError(
            f"--lora-dropout is {settings.lora_dropout:g}, and ranks that share a sequence would drop the same places "
            "of different tokens: set it to 0, or train with --parallel_mode data_parallel"
        )
    if not settings.is_on:
        given = {
            "--lora-alpha": settings.lora_alpha,
            "--lora-dropout": settings.lora_dropout,
            "--lora-targets": settings.lora_targets,
            "--lora-train": settings.lora_train,
            "--quantize": settings.quantize,
        }
        for flag, value in given.items():
            if value:
                shown = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"{flag} is {shown}, and --lora-r 0, which trains all weights: give a rank by --lora-r"
                )
    if settings.quantize and dtype == "float64":
        raise ValueError(
            f"--quantize {settings.quantize} does not go with --dtype {dtype}, which bitsandbytes does not compute in: "
            "take bfloat16 or float32, or leave --quantize out"
        )
    if settings.is_on:
        _check_package("peft", f"--lora-r {settings.lora_r}")
    if settings.quantize:
        _check_package("bitsandbytes", f"--quantize {settings.quantize}")
    if optimizer == "muon":
        if settings.is_on:
            raise ValueError(
                f"--optimizer muon is for whole matrices, and --lora-r is {settings.lora_r}, which trains thin ones "
                "beside them: take --optimizer adamw, or --lora-r 0 to train all weights"
            )
    elif optimizer != "adamw":
        _check_package("bitsandbytes", f"--optimizer {optimizer}")


def check_quantize_package(quantize: str | None) -> None:
    """ValueError, with the pip command, where weights are to be quantised and bitsandbytes is not there."""
    if quantize:
        _check_package("bitsandbytes", f"--quantize {quantize}")


def check_adapter_package(folder: str) -> None:
    """ValueError, with the pip command, where an adapter is to be loaded and peft is not there."""
    _check_package("peft", f"the adapter {folder}")


def check_adapter_engine(settings: AdapterSettings, optimizer: str, accelerator: Accelerator) -> None:
    """Refuse what an engine cannot do with quantised weights, or with other optimizers than AdamW.

    Raises:
        ValueError: with the way out.
    """
    check_adapter_kind(settings, optimizer, accelerator.distributed_type, engine_name(accelerator))


def check_adapter_kind(settings: AdapterSettings, optimizer: str, kind: str, engine: str) -> None:
    """The same, of accelerate's `distributed_type` and the engine's name, without a launch."""
    is_deepspeed = kind == DistributedType.DEEPSPEED
    if settings.quantize and is_deepspeed:
        raise ValueError(
            f"--quantize {settings.quantize} does not go with {engine}, under which transformers does not "
            "load weights in 4 bits: take accelerate_configs/ddp.yaml, or fsdp2.yaml to shard the 4-bit weights"
        )
    if optimizer != "adamw" and (is_deepspeed or kind == DistributedType.FSDP):
        reason = "and Muon needs a matrix whole" if optimizer == "muon" else "which bitsandbytes does not step"
        raise ValueError(
            f"--optimizer {optimizer} does not go with {engine}, whose parameters are sharded, {reason}: "
            "take --optimizer adamw, whose state is sharded too (and offloaded by the engine's own setting), or "
            "accelerate_configs/ddp.yaml"
        )


def _check_package(name: str, what: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{what} needs the package {name}, which is not installed: {INSTALL}")
