"""One training step, measured: seconds, rate, peaks of memory."""

import contextlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from easyctx.loss import global_sum
from easyctx.memory.budget import GIB
from step_parts.models import peak_flops


def measure_step(
    step: Callable[[torch.Tensor], tuple[float, float | None]],
    ids: torch.Tensor,
    sequences: int,
    flops: float,
    device: torch.device,
    num_processes: int,
) -> dict[str, Any]:
    """Seconds, peaks, loss and gradient norm of a step.

    Args:
        step: takes the ids, gives loss and gradient norm.
        ids: int64 `[1, S]`, of this rank's sequence.
        sequences: how many all ranks have together.
        flops: of the model, for these.
    """
    reset_peaks()
    retries = allocator_retries()
    synchronize(device)
    start = time.perf_counter()
    loss, norm = step(ids)
    synchronize(device)
    seconds = time.perf_counter() - start
    peak, on_gpu = peak_flops(), torch.cuda.is_available()
    return {
        "seconds": seconds,
        "tokens_per_s": ids.shape[1] * sequences / seconds,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "reserved_gpu_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        # Each one emptied the allocator's cache, since the GPU was full: the step waits for that.
        "allocator_retries": allocator_retries() - retries if on_gpu else None,
        "peak_host_gib": global_sum(peak_host_memory(), device) / GIB,
        "mfu": flops / seconds / num_processes / peak if peak else None,
        "loss": loss,
        "grad_norm": norm,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def reset_peaks() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # where the kernel does not let it, the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def allocator_retries() -> int:
    """How often PyTorch's allocator found the GPU full and gave back what it had cached, on this rank so far."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0


def peak_host_memory() -> int:
    """Bytes resident at most since `reset_peaks`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
