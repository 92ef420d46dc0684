"""What a run says: its decisions before the first step, its progress, its metrics."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from easyctx.engine import engine_name
from easyctx.mesh import Mesh
from easyctx.training.config import TrainConfig

GIB = 2**30


class Reporter:
    """The progress bar on rank 0 and the trackers behind it."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, mesh: Mesh) -> None:
        self.config, self.accelerator = config, accelerator
        self.tokens_per_step = config.seq_length * config.batch_size * mesh.dp_size * config.gradient_accumulate_every
        self._announce(mesh)
        if config.tracker != "none":
            settings = {
                k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.as_dict().items()
            }
            accelerator.init_trackers(config.wandb or "easyctx", config=settings)
        self.bar = tqdm(
            total=config.max_train_steps,
            disable=not accelerator.is_main_process,
            desc="train",
            dynamic_ncols=True,
        )
        self.first_metrics: dict[str, float] = {}
        self.last_metrics: dict[str, float] = {}
        self._clock = time.perf_counter()

    def _announce(self, mesh: Mesh) -> None:
        config, device = self.config, self.accelerator.device.type
        sequences = self.tokens_per_step // config.seq_length
        self.accelerator.print(
            f"easyctx: {config.parallel_mode}, {mesh}, {engine_name(self.accelerator)} on {device}; "
            f"{config.seq_length:,} tokens a sequence, {-(-config.seq_length // mesh.sp_size):,} a rank; "
            f"global batch {sequences} sequences = {self.tokens_per_step:,} tokens a step"
        )

    def step(self, step: int, loss: float, grad_norm: float, rate: float) -> None:
        """Record a finished optimizer step: `loss` is the global token mean."""
        now = time.perf_counter()
        self.last_metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "tokens_per_second": self.tokens_per_step / (now - self._clock),
            "peak_gib": peak_memory_gib(),
        }
        self.first_metrics = self.first_metrics or self.last_metrics
        self._clock = now
        if self.config.tracker != "none":
            self.accelerator.log(self.last_metrics, step=step + 1)
        shown = self.last_metrics
        self.bar.set_postfix_str(
            f"loss {loss:.4f} ppl {shown['perplexity']:.2f} {shown['tokens_per_second']:,.0f} tok/s "
            f"peak {shown['peak_gib']:.2f} GiB",
            refresh=False,
        )
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def as_float(norm: Any) -> float:
    """A gradient norm as engines return it (float, tensor, sharded tensor, None) as a number."""
    if norm is None:
        return math.nan
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return float(norm)
