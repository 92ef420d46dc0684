"""What a child of benchmarks/train_step.py does: one method at all lengths, on one rank."""

import argparse
import contextlib
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from results_file import write_results
from step_child import end_with_parent, fail
from step_models import model_config, model_flops, peak_flops
from step_rows import add_row, compared, read_rows
from step_settings import shared_flags

from easyctx.loss import global_sum
from easyctx.memory.budget import GIB
from easyctx.mesh import leave_processes

Row = dict[str, Any]


def make_method(name: str, args: argparse.Namespace, flags: list[str]) -> Any:
    """The method, with its model on this rank; ValueError for what is missing here."""
    import step_methods as ways

    if name != "easyctx":
        flags = shared_flags(flags)
    if name == "alst":
        from step_alst import Alst

        return Alst(args, flags)
    kinds = {
        "easyctx": ways.Method,
        "easycontext": ways.EasyContext,
        "easycontext_offload": ways.EasyContextOffload,
        "context_parallel": ways.ContextParallel,
    }
    return kinds[name](args, flags)


def run_method(args: argparse.Namespace, flags: list[str]) -> int:
    """Add a row for each length to the file of rows; 1 where a method failed that way which may differ by rank."""
    end_with_parent()
    [name], folder = args.methods, args.child
    length = args.warmup_length
    try:
        method, rows = make_method(name, args, flags), None
    except ValueError as error:  # the same on all ranks
        method, rows = None, [{"method": name, "error_message": str(error)}] * len(args.seq_lengths)
    except Exception as error:
        fail(folder, length, error)
        raise
    try:
        if method is None:
            for length, row in zip(args.seq_lengths, rows or (), strict=True):
                keep(args, name, described(args, length) | row)
            return 0
        measure(method, args.warmup_length, 1)
        for length in args.seq_lengths:
            row = described(args, length) | {"method": method.label}
            try:
                row |= measure(method, length, args.steps)
            except ValueError as error:
                row["error_message"] = str(error)
            keep(args, name, row)
    except Exception as error:  # out of memory, above all
        fail(folder, length, error)
        raise
    del method
    leave_processes()
    return 0


def described(args: argparse.Namespace, length: int) -> Row:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layers = model_config(args.model, args.layers, length).num_hidden_layers
    return {"method": "", "model": args.model, "layers": layers, "gpus": world, "seq_length": length}


def keep(args: argparse.Namespace, name: str, row: Row) -> None:
    """Add a row, and write the result file anew: a later method may run out of time."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    add_row(args.child, row | {"asked": name})
    rows = compared(read_rows(args.child))
    write_results("train_step", rows, args.output)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)


def measure(method: Any, length: int, steps: int) -> Row:
    """Steps on a random sequence: seconds of the fastest, peaks, loss and gradient norm, what the method says of it."""
    row = method.arrange(length)
    generator = torch.Generator().manual_seed(method.config.seed + method.data_rank)
    ids = torch.randint(0, method.hf_config.vocab_size, (1, length), generator=generator)
    reset_peaks()
    all_seconds = []
    for _ in range(steps):
        synchronize(method.device)
        start = time.perf_counter()
        loss, norm = method.step(ids)
        synchronize(method.device)
        all_seconds.append(time.perf_counter() - start)
    seconds = min(all_seconds)
    peak, flops = peak_flops(), model_flops(method.hf_config, length) * method.sequences
    on_gpu = torch.cuda.is_available()
    return {
        "seconds": seconds,
        "seconds_of_steps": all_seconds,
        "tokens_per_s": length * method.sequences / seconds,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "reserved_gpu_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        "peak_host_gib": global_sum(peak_host_memory(), method.device) / GIB,
        "mfu": flops / seconds / method.num_processes / peak if peak else None,
        "loss": loss,
        "grad_norm": norm,
    } | row


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


def peak_host_memory() -> int:
    """Bytes resident at most since `reset_peaks`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
