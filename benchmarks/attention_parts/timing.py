"""Times and peak memory of a method, the slowest rank's, in repeats that follow each other without a pause."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from attention_parts.methods import Method, Tensors
from easyctx.mesh import num_processes

FEWEST, MOST = 3, 50  # repeats


@dataclass(frozen=True)
class Measured:
    """Medians over repeats, in milliseconds; of the whole also the quickest and the slowest repeat."""

    ms: float
    forward_ms: float
    backward_ms: float
    ms_min: float
    ms_max: float
    repeats: int
    peak_gib: float | None  # on the fullest GPU, q, k, v and dout included; None without a GPU


def measure(method: Method, tensors: Tensors, seconds: float) -> Measured:
    """Time a method for about so many seconds, after a warm-up of three passes.

    tensors: this rank's q, k, v and dout. On a GPU times are CUDA events', and no repeat waits for the host, as
    layers in a training step do not.
    """
    device = tensors[0].device
    with method.context():
        for _ in range(2):
            _passes(method, tensors, 1)
        [estimate] = _slowest([sum(_passes(method, tensors, 1)[0])], device)
        repeats = min(max(int(seconds * 1000 / max(estimate, 1e-3)), FEWEST), MOST)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = _passes(method, tensors, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    flat = _slowest([*(t for pair in times for t in pair), *(sum(pair) for pair in times), peak or 0.0], device)
    both, whole = flat[: 2 * repeats], flat[2 * repeats : -1]
    return Measured(
        statistics.median(whole),
        statistics.median(both[::2]),
        statistics.median(both[1::2]),
        min(whole),
        max(whole),
        repeats,
        None if peak is None else flat[-1],
    )


def profile(method: Method, tensors: Tensors, path: Path) -> None:
    """Where one pass of this rank spends its time: a table of kernels in `path`, and a trace for chrome://tracing."""
    on_gpu = tensors[0].device.type == "cuda"
    with method.context(), torch.profiler.profile() as found:
        _passes(method, tensors, 1)
    table = found.key_averages().table(sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total", row_limit=30)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table)
    found.export_chrome_trace(str(path.with_suffix(".json.gz")))


def _passes(method: Method, tensors: Tensors, repeats: int) -> list[tuple[float, float]]:
    """(forward, backward) of each repeat on this rank, in milliseconds."""
    *qkv, dout = tensors
    mark, between = _clock(dout.device)
    marks = []
    for _ in range(repeats):
        start = mark()
        state = method.forward(*qkv)
        middle = mark()
        method.backward(state, dout)
        del state
        marks.append((start, middle, mark()))
    if dout.device.type == "cuda":
        torch.cuda.synchronize(dout.device)
    return [(between(a, b), between(b, c)) for a, b, c in marks]


def _clock(device: torch.device) -> tuple[Callable[[], object], Callable[..., float]]:
    """A function that marks this moment, and one that gives the milliseconds between two marks."""
    if device.type != "cuda":
        return time.perf_counter, lambda a, b: 1000 * (b - a)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda a, b: a.elapsed_time(b)


def _slowest(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if num_processes() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
