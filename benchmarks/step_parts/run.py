"""What a child of benchmarks/train_step.py does: one method at all lengths, on one rank."""

import argparse
import json
import os
from typing import Any

import torch
from shared_parts.results_file import write_results

from easyctx.mesh import leave_processes
from step_parts.child import end_with_parent, fail
from step_parts.measure import measure_step
from step_parts.models import model_config, model_flops
from step_parts.rows import add_row, compared, read_rows
from step_parts.settings import shared_flags

Row = dict[str, Any]


def make_method(name: str, args: argparse.Namespace, flags: list[str]) -> Any:
    """The method, with its model on this rank; ValueError for what is missing here."""
    if name != "easyctx":
        flags = shared_flags(flags)
    if name == "alst":
        from step_parts.alst import Alst

        return Alst(args, flags)
    from step_parts.own import Own
    from step_parts.rivals import ContextParallel, EasyContext, EasyContextOffload

    kinds = {
        "easyctx": Own,
        "easycontext": EasyContext,
        "easycontext_offload": EasyContextOffload,
        "context_parallel": ContextParallel,
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
    """The fastest of some steps on a random sequence, and what the method says of itself."""
    said = {"engine": method.under} | method.arrange(length)
    generator = torch.Generator().manual_seed(method.config.seed + method.data_rank)
    ids = torch.randint(0, method.hf_config.vocab_size, (1, length), generator=generator)
    flops = model_flops(method.hf_config, length) * method.sequences
    size = (method.sequences, flops, method.device, method.num_processes)
    found = [measure_step(method.step, ids, *size) for _ in range(steps)]
    all_seconds = [row["seconds"] for row in found]
    row = found[all_seconds.index(min(all_seconds))] | {"seconds_of_steps": all_seconds} | said
    return method.as_whole(row, length)
