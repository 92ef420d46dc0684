"""One full fine-tuning step on a random model: tokens/s, peak memory beside the predicted one, loss, gradient norm.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 1 \\
        benchmarks/train_step.py --model llama-3-8b --layers 8 --seq-lengths 65536 131072
    python benchmarks/train_step.py --model tiny --seq-lengths 256    # on a CPU

One process takes `data_parallel` (our attention on the whole sequence), several take `--parallel_mode`. The first step
is a warm-up on a short sequence: kernels compile, the optimizer makes its state. All further flags are the train
loop's: `--mlp-tile 8192 --keep-attention host` and so on. Each length is planned for by itself, with the GPU memory
that was free at the start.
"""

import argparse
import contextlib
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from results_file import print_table, write_results
from transformers import AutoModelForCausalLM, LlamaConfig

from easyctx.engine import make_accelerator
from easyctx.loss import global_sum
from easyctx.memory.budget import GIB, MemoryShape
from easyctx.memory.describe import OutOfMemory, describe_choices
from easyctx.memory.policy import usable_gpu_memory
from easyctx.modes import make_mode_mesh
from easyctx.train import train_step
from easyctx.training.flags import parse_arguments
from easyctx.training.memory import decide_memory, explained_out_of_memory
from easyctx.training.model import patch_model, weight_dtype
from easyctx.training.optimizer import make_optimizer

MODELS = {
    "llama-3-8b": dict(hidden=4096, intermediate=14336, layers=32, heads=(32, 8), vocab=128256),
    "llama-2-7b": dict(hidden=4096, intermediate=11008, layers=32, heads=(32, 32), vocab=32000),
    "llama-33b": dict(hidden=6656, intermediate=17920, layers=60, heads=(52, 52), vocab=32000),
    "llama-3-1b": dict(hidden=2048, intermediate=8192, layers=16, heads=(32, 8), vocab=128256),
    "tiny": dict(hidden=64, intermediate=128, layers=4, heads=(4, 2), vocab=512),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}  # dense bfloat16


def model_config(name: str, layers: int | None, length: int) -> LlamaConfig:
    sizes: dict[str, Any] = MODELS[name]
    return LlamaConfig(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=layers or sizes["layers"],
        num_attention_heads=sizes["heads"][0],
        num_key_value_heads=sizes["heads"][1],
        vocab_size=sizes["vocab"],
        max_position_embeddings=length,
        use_cache=False,
    )


def model_flops(config: LlamaConfig, length: int) -> float:
    """Of one sequence, forward and backward, causal attention counted once, nothing recomputed."""
    shape = MemoryShape.from_config(config)
    matrices = shape.parameters - shape.vocab * shape.hidden  # looking a token up takes none
    return 6 * matrices * length + 6 * shape.num_layers * shape.q_width * length**2


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def measure(
    model: Any, optimizer: Any, config: Any, hf_config: LlamaConfig, accelerator: Any, mesh: Any
) -> dict[str, Any]:
    """One step on a random sequence."""
    generator = torch.Generator().manual_seed(config.seed + mesh.dp_rank)
    ids = torch.randint(0, hf_config.vocab_size, (1, config.seq_length), generator=generator)
    reset_peaks()
    synchronize(accelerator.device)
    start = time.perf_counter()
    with explained_out_of_memory(model):
        loss, norm = train_step(model, optimizer, iter([{"input_ids": ids}]), config, hf_config, accelerator, mesh)
    synchronize(accelerator.device)
    seconds = time.perf_counter() - start
    tokens = config.seq_length * mesh.dp_size
    peak, flops = peak_flops(), model_flops(hf_config, config.seq_length) * mesh.dp_size
    on_gpu = torch.cuda.is_available()
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "reserved_gpu_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        "peak_host_gib": global_sum(peak_host_memory(), accelerator.device) / GIB,
        "mfu": flops / seconds / accelerator.num_processes / peak if peak else None,
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


def peak_host_memory() -> int:
    """Bytes resident at most since `reset_peaks`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(args: argparse.Namespace, flags: list[str]) -> list[dict[str, Any]]:
    """A row for each length."""
    fixed = ["--model", args.model, "--dataset", "random", "--output-dir", "unused", "--tracker", "none"]
    config = parse_arguments([*fixed, "--gradient-accumulate-every", "1", "--max-grad-norm", "0", *flags])
    accelerator = make_accelerator(max_grad_norm=0.0)
    if config.parallel_mode != "data_parallel" and accelerator.num_processes == 1:
        config.parallel_mode = "data_parallel"
    mesh = make_mode_mesh(config.parallel_mode, config.sp_degree, config.ring_degree)
    longest = max(args.seq_lengths)
    hf_config = model_config(args.model, args.layers, longest)
    if config.gpu_memory is None and torch.cuda.is_available():
        config.gpu_memory = usable_gpu_memory(torch.cuda.mem_get_info(accelerator.device)[0]) / GIB
    torch.manual_seed(config.seed)
    with accelerator.device:
        model: Any = AutoModelForCausalLM.from_config(hf_config, dtype=weight_dtype(config.dtype, accelerator))
    inner = model
    optimizer = make_optimizer(model.parameters(), config)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    rows = []
    for length in (args.warmup_length, *args.seq_lengths):
        config.seq_length = length
        row: dict[str, Any] = {
            "method": f"easyctx {config.parallel_mode}",
            "model": args.model,
            "layers": hf_config.num_hidden_layers,
            "gpus": accelerator.num_processes,
            "seq_length": length,
        }
        try:
            memory = decide_memory(config, hf_config, accelerator, mesh)
            patch_model(inner, config, memory, accelerator, mesh)
            for line in memory.lines() if memory else ():
                accelerator.print(f"easyctx: {line}", flush=True)
            row |= measure(model, optimizer, config, hf_config, accelerator, mesh)
            if memory is not None:
                predicted = memory.decision.predicted
                row["predicted_gpu_gib"] = predicted.gpu_peak / GIB
                row["predicted_host_gib"] = predicted.host_peak / GIB
                row["moment"], row["choices"] = predicted.moment, describe_choices(memory.decision.choices)
                row["kernel"] = memory.setting.kernel
        except ValueError as error:
            row["error_message"] = str(error)
        except OutOfMemory as error:
            row["error_message"] = str(error)
            rows.append(row)
            break  # what the other ranks do now nobody knows
        accelerator.print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if length != args.warmup_length:
            rows.append(row)
    return rows if accelerator.is_main_process else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="in place of the model's own number")
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[65536])
    parser.add_argument("--warmup-length", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="folder of the result file")
    args, flags = parser.parse_known_args()
    if "--parallel_mode" not in flags and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        flags += ["--parallel_mode", "zigzag_ring_attn"]
    rows = run(args, flags)
    if rows:
        path = write_results("train_step", rows, args.output)
        print_table([{k: v for k, v in row.items() if k not in ("choices", "moment")} for row in rows])
        print(path)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
