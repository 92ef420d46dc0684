"""`easyctx plan`: how long a sequence fits, what it takes of memory and time, and how to start it. No GPU needed."""

from __future__ import annotations

import argparse
from typing import Any

EXIT_DOES_NOT_FIT = 1
DEFAULT_GPU = "h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `easyctx plan`."""
    from easyctx.adapters.settings import LORA_TRAIN, OPTIMIZERS, QUANTIZE
    from easyctx.cost.choose import AUTO
    from easyctx.cost.hardware import DEVICES
    from easyctx.cost.models import MODELS
    from easyctx.cost.plan import PLAN_ENGINES
    from easyctx.modes import MODES

    parser.description = (
        "Predict, from the sizes of a model and the rates of a machine, the longest sequence that fits, where the"
        " memory goes, and the time of a step in each mode. Nothing is run and no weights are loaded."
    )
    parser.epilog = "Exit status: 0, 1 if --seq-length does not fit, 2 bad input."

    def flag(name: str, help: str, **kwargs: Any) -> None:
        names = {f"--{name}", f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}"}
        parser.add_argument(*sorted(names), dest=name.replace("-", "_"), help=help, **kwargs)

    known = ", ".join(MODELS)
    flag("model", f"folder or file of a config.json, hub name, family, or one of {known}", required=True)
    flag("gpus", "GPUs, of all nodes together", type=int, required=True, metavar="N")
    flag("gpu", f"which (default: {DEFAULT_GPU}): {', '.join(DEVICES)}", default=DEFAULT_GPU)
    flag("gpu-memory", "GiB of each (default: the GPU's own)", type=float, metavar="GIB")
    flag("host-memory", "GiB of each node's host memory (default: 1000)", type=float, default=1000.0, metavar="GIB")
    flag("nodes", "machines (default: 1)", type=int, default=1, metavar="N")
    flag("seq-length", "tokens to a sequence (default: the longest that fits)", type=int, metavar="N")
    flag(
        "engine",
        "what holds the weights (default: zero3_offload; ddp with --quantize or another --optimizer)",
        choices=PLAN_ENGINES,
    )
    modes = (AUTO, *MODES)
    flag("parallel_mode", f"{', '.join(modes)} (default: auto)", choices=modes, default=AUTO, metavar="MODE")
    flag("ring_degree", "ring part of the GPUs of a sequence, for usp_attn", type=int, metavar="N")
    flag("sp-degree", "GPUs that share one sequence (default: all)", type=int, metavar="N")
    flag("batch-size", "sequences to a micro-batch (default: 1)", type=int, default=1, metavar="N")
    flag("gradient-accumulate-every", "micro-batches to a step (default: 1)", type=int, default=1, metavar="N")
    flag("lora-r", "rank of LoRA adapters in place of full fine-tuning (default: 0, none)", type=int, default=0)
    flag("lora-targets", "names of the adapted layers (default: all linear ones)", nargs="+", metavar="NAME")
    flag("lora-train", "parts trained whole beside the adapters", nargs="+", choices=LORA_TRAIN, default=[])
    flag("quantize", "hold the frozen weights in 4 bits, with --lora-r", choices=QUANTIZE)
    flag("double-quant", "quantise their scales as well", action=argparse.BooleanOptionalAction, default=True)
    flag("optimizer", "(default: adamw)", choices=OPTIMIZERS, default="adamw")
    flag("liger", "norms, SwiGLU and RoPE by Liger's kernels", action="store_true")
    flag("attn-kernel", "attention kernel (default: auto)", default="auto", metavar="NAME")
    flag("rates", 'JSON file of rates in place of the table\'s, such as {"nvlink_rate": 3e11}', metavar="FILE")
    flag("json", "also write everything to this file", metavar="FILE")
    flag("plot", "also draw memory over length into this PNG file", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Work out, print and write; raises `ValueError` for a user's mistake."""
    from pathlib import Path

    from easyctx.cost.plan import make_plan
    from easyctx.cost.plan_plot import draw_plan
    from easyctx.cost.plan_report import as_json, report
    from easyctx.evals.results import write_json

    for name in ("json", "plot"):
        if (file := getattr(args, name)) and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"--{name} {file}: there is no folder {Path(file).parent}: make it, or name another")
        if file and Path(file).is_dir():
            raise ValueError(f"--{name} {file} is a folder: name a file in it")
    if args.plot and Path(args.plot).suffix != ".png":
        raise ValueError(f"--plot {args.plot} must end in .png")
    request, source = make_request(args)
    plan = make_plan(request)
    print("\n".join(report(plan, args.model, source)), flush=True)
    if args.json:
        write_json(Path(args.json), as_json(plan, args.model, source))
    if args.plot:
        draw_plan(plan, args.model, Path(args.plot))
    return 0 if plan.decision is not None else EXIT_DOES_NOT_FIT


def make_request(args: argparse.Namespace) -> tuple[Any, str]:
    """The request, and where the model's sizes come from."""
    import math

    from easyctx.adapters.folder import config_source
    from easyctx.adapters.prepare import adopt_adapter
    from easyctx.capability import FAMILIES
    from easyctx.cost.hardware import GIB, find_device, load_rates
    from easyctx.cost.kernels import kernel_rates
    from easyctx.cost.models import load_shape_config, windows_of
    from easyctx.cost.plan import Request
    from easyctx.memory.adapters import shape_of_run

    adopt_adapter(args)
    engine = engine_of(args)
    device = find_device(args.gpu)
    if args.rates:
        device = load_rates(device, args.rates)
    kernel_rates(device, args.attn_kernel)
    for name in ("gpu_memory", "host_memory"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be positive GiB, such as 80")
    config, source = load_shape_config(config_source(args.model))
    if (family := config.get_text_config(decoder=True).model_type) not in FAMILIES:
        raise ValueError(
            f"plans are made for the families {', '.join(FAMILIES)}, and {source} is of {family}: name one of these "
            "(easyctx.train may train others with --parallel_mode data_parallel)"
        )
    request = Request(
        shape_of_run(args, config),
        windows_of(config),
        device,
        args.gpus,
        args.nodes,
        device.memory_bytes if args.gpu_memory is None else args.gpu_memory * GIB,
        args.host_memory * GIB,
        engine,
        args.parallel_mode,
        args.ring_degree,
        args.sp_degree,
        args.seq_length,
        args.batch_size,
        args.gradient_accumulate_every,
        args.attn_kernel,
        args.optimizer,
    )
    return request, source


def engine_of(args: argparse.Namespace) -> str:
    """The engine asked for, or one that goes with the adapters; ValueError for flags that contradict each other."""
    if args.lora_r < 0:
        raise ValueError(f"--lora-r is {args.lora_r}: give a rank of at least 1, or 0 for full fine-tuning")
    for name in ("lora_targets", "lora_train", "quantize"):
        if (value := getattr(args, name)) and not args.lora_r:
            shown = value if isinstance(value, str) else " ".join(value)
            raise ValueError(f"--{name.replace('_', '-')} is {shown}, and --lora-r 0: give a rank by --lora-r")
    if args.optimizer == "muon" and args.lora_r:
        raise ValueError(
            f"--optimizer muon is for whole matrices, and --lora-r is {args.lora_r}: take adamw, or rank 0"
        )
    is_small = args.optimizer != "adamw"
    engine = args.engine or ("ddp" if args.quantize or is_small else "zero3_offload")
    if args.quantize and engine.startswith("zero3"):
        raise ValueError(f"--quantize {args.quantize} does not go with --engine {engine}: take ddp or fsdp2")
    if is_small and engine != "ddp":
        raise ValueError(
            f"--optimizer {args.optimizer} does not step what --engine {engine} shards: take ddp, or adamw"
        )
    return engine
