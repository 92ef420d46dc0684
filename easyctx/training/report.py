"""What a run says: its decisions before the first step, its progress, its metrics."""

import math
import os
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from easyctx.engine import engine_name
from easyctx.mesh import Mesh
from easyctx.parser import print_once
from easyctx.training.config import TrainConfig
from easyctx.training.flops import peak_tflops
from easyctx.training.progress import Progress
from easyctx.training.work import Work

GIB = 2**30
SHOWN = 400  # characters of a sample; the file has all of them


class Reporter:
    """The progress bar on rank 0 and the trackers behind it."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, mesh: Mesh, progress: Progress, work: Work
    ) -> None:
        self.config, self.accelerator, self.progress, self.work = config, accelerator, progress, work
        self.sequences_per_step = work.sequences_per_step
        peak = peak_tflops(config.peak_tflops, accelerator.mixed_precision)
        self.peak_flops = peak * 1e12 * accelerator.num_processes if peak else None
        self._announce(mesh)
        if config.tracker != "none":
            settings = {
                k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.as_dict().items()
            }
            accelerator.init_trackers(config.wandb or "easyctx", config=settings)
        self.bar = tqdm(
            total=config.max_train_steps,
            initial=progress.step,
            disable=not accelerator.is_main_process,
            desc="train",
            dynamic_ncols=True,
        )
        self._clock = time.perf_counter()

    def _announce(self, mesh: Mesh) -> None:
        config, device = self.config, self.accelerator.device.type
        tokens = "up to " * bool(config.buckets) + f"{config.seq_length * self.sequences_per_step:,}"
        self.accelerator.print(
            f"easyctx: {config.parallel_mode}, {mesh}, {engine_name(self.accelerator)} on {device}; "
            f"{self.work.about_rows}; global batch {self.sequences_per_step} sequences = {tokens} tokens a step"
        )
        if self.progress.step:
            self.accelerator.print(
                f"easyctx: goes on after step {self.progress.step} of {config.max_train_steps} and "
                f"{self.progress.samples:,} sequences"
            )

    def step(self, loss: float, grad_norm: float | None, rate: float) -> None:
        """Record the optimizer step that was counted last: `loss` is the global token mean."""
        now, progress = time.perf_counter(), self.progress
        tokens, flops = self.work.of_step(progress.samples - self.sequences_per_step)
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "grad_norm": math.nan if grad_norm is None else grad_norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / (now - self._clock),
            "peak_gib": peak_memory_gib(),
            "skipped_steps": progress.skipped,
        }
        mfu = ""
        if self.peak_flops and flops:
            metrics["mfu"] = flops / self.peak_flops / (now - self._clock)
            mfu = f" MFU {metrics['mfu']:.1%}"
        progress.first_metrics = progress.first_metrics or metrics
        progress.last_metrics = metrics
        if self.config.tracker != "none":
            self.accelerator.log(metrics, step=progress.step)
        skipped = f" {progress.skipped} skipped" if progress.skipped else ""
        self.bar.set_postfix_str(
            f"loss {loss:.4f} ppl {metrics['perplexity']:.2f} {metrics['tokens_per_second']:,.0f} tok/s{mfu} "
            f"peak {metrics['peak_gib']:.2f} GiB{skipped}",
            refresh=False,
        )
        self.bar.update()
        self._clock = time.perf_counter()

    def validated(self, metrics: dict[str, float]) -> None:
        """Record what was measured on other rows after the step."""
        if not metrics:
            return
        last = self.progress.last_metrics
        self.progress.last_metrics = last | {f"eval_{name}": value for name, value in metrics.items()}
        if self.config.tracker != "none":
            self.accelerator.log({f"eval/{name}": value for name, value in metrics.items()}, step=self.progress.step)
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{name.removeprefix('perplexity_')}: {value:.4g}" for name, value in metrics.items())
            tqdm.write(f"easyctx: perplexity by length after step {self.progress.step}: {shown}", file=sys.stdout)
        self._clock = time.perf_counter()

    def sampled(self, answers: list[str]) -> None:
        """Show what the model said after the step."""
        if not answers:
            return
        if self.accelerator.is_main_process:
            for number, answer in enumerate(answers):
                shown = answer if len(answer) <= SHOWN else answer[:SHOWN] + " …"
                tqdm.write(f"easyctx: prompt {number} after step {self.progress.step}: {shown!r}", file=sys.stdout)
        self._clock = time.perf_counter()

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


def as_float(norm: Any) -> float | None:
    """A gradient norm as engines return it (float, tensor, sharded tensor, None) as a number."""
    if norm is None:
        return None
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return float(norm)


def print_error(error: BaseException, *, on_all_ranks: bool) -> None:
    """One line for the user: of the first rank, or of any, named."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not on_all_ranks:
        print_once(str(error))
    else:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
