"""Seconds to take in a long context and to generate behind it, beside what the GPU's own rates allow.

    torchrun --nproc-per-node 2 benchmarks/generation.py [--tokens 131072] [--model 8B] [--offload-cache]
    python benchmarks/generation.py --parallel_mode data_parallel

The ideal is the forward's FLOPs at the rates of this GPU: of one matrix product of the MLP's shape, and of the local
attention kernel on one rank's share of the context, causal. Both are measured in the same run. Prefill is until the
first token of the answers is there; a step is the model's call that gives one token to each question, without drawing
that token, and its time is the median. After `--seconds` nothing is repeated and no further row begun; a row says how
often the prefill was timed.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared_parts.needle_cells import Flops
from shared_parts.random_models import SHAPES, NoText, make_config, make_model
from shared_parts.results_file import print_table, write_results

from easyctx.band import CAUSAL
from easyctx.engine import launched_processes
from easyctx.generation import Generator
from easyctx.generation.calls import Call
from easyctx.kernel import Score, Workload, get_kernel
from easyctx.liger import check_liger, use_liger_kernels
from easyctx.mesh import leave_processes
from easyctx.modes import MODES, check_mode, make_mode_mesh


class TimedGenerator(Generator):
    """Notes the seconds of every call of the model that generates one token for each question."""

    step_seconds: list[float]

    def _run(self, call: Call, rows: list[int]) -> torch.Tensor:
        if call.body or any(len(branch.ids) > 1 for branch in call.branches):
            return super()._run(call, rows)
        _wait()
        begin = time.perf_counter()
        logits = super()._run(call, rows)
        _wait()
        self.step_seconds.append(time.perf_counter() - begin)
        return logits


class Limit:
    """The seconds of a run, by the first rank's clock, so that all ranks decide alike."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def is_over(self) -> bool:
        over = [time.perf_counter() > self.end]
        if dist.is_initialized():
            dist.broadcast_object_list(over)
        return over[0]


def timed(work: Callable[[], Any], repeats: int, limit: Limit | None = None) -> list[float]:
    """Seconds of up to `repeats` runs, at least one, on the slowest rank."""
    times: list[float] = []
    while len(times) < repeats and not (times and limit and limit.is_over()):
        _wait()
        begin = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - begin)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def local_rates(shape: dict[str, int], tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a matrix product and of causal attention over `tokens`."""
    rows = min(tokens, 16384)
    x = torch.randn(rows, shape["hidden_size"], device=device, dtype=dtype)
    w = torch.randn(shape["hidden_size"], shape["intermediate_size"], device=device, dtype=dtype)
    product = 2 * rows * w.numel() / min(timed(lambda: x @ w, 20))
    heads, keys, dim = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q = torch.randn(1, tokens, heads, dim, device=device, dtype=dtype)
    k, v = torch.randn(2, 1, tokens, keys, dim, device=device, dtype=dtype)
    kernel = get_kernel("auto", Workload(device, dtype, dim))
    score = Score(dim**-0.5)
    attention = 2 * tokens**2 * heads * dim / min(timed(lambda: kernel.forward(q, k, v, CAUSAL, score), 5))
    return product, attention


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each chunk size and number of questions. All ranks go through them together."""
    shape, limit = SHAPES[args.model], Limit(args.seconds)
    mesh = make_mode_mesh(args.parallel_mode, ring_degree=args.ring_degree)
    model = make_model(shape, device)
    if args.liger:
        use_liger_kernels(model)
    model.generation_config.eos_token_id = None
    context = torch.randint(0, shape["vocab_size"], (args.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    flops = Flops.of(shape)
    product, attention = local_rates(shape, args.tokens // mesh.sp_size, device, model.dtype)
    pairs = args.tokens * (args.tokens + 1) // 2
    ideal = (args.tokens * flops.linear / product + pairs * flops.attention / attention) / mesh.sp_size
    for row, (chunk, number) in enumerate(itertools.product(args.prefill_chunk, args.questions)):
        if row > 0 and limit.is_over():
            return
        generator = TimedGenerator(model, NoText(), args.parallel_mode, mesh, chunk, args.offload_cache)
        questions = [[i + 1] * 20 for i in range(number)]

        def answer(
            new_tokens: int, generator: TimedGenerator = generator, questions: list[list[int]] = questions
        ) -> None:
            generator.answer(context, questions, max_new_tokens=new_tokens)

        generator.step_seconds = []
        answer(2)  # compiles kernels
        prefills = timed(lambda answer=answer: answer(1), 3, limit)
        prefill = min(prefills)
        generator.step_seconds = []
        answer(1 + args.new_tokens)
        yield {
            "method": args.parallel_mode,
            "model": args.model,
            "gpus": mesh.sp_size,
            "tokens": args.tokens,
            "questions": number,
            "prefill_chunk": chunk,
            "offload": args.offload_cache,
            "liger": args.liger,
            "prefill_seconds": prefill,
            "prefills_timed": len(prefills),
            "ideal_seconds": ideal,
            "share_of_ideal": ideal / prefill,
            "ms_per_step": 1000 * statistics.median(generator.step_seconds),
            "product_tflops": product / 1e12,
            "attention_tflops": attention / 1e12,
            "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 8], help="answered at the same time")
    parser.add_argument("--prefill-chunk", type=int, nargs="+", default=[16384], help="tokens of a rank at a time")
    parser.add_argument("--offload-cache", action="store_true")
    parser.add_argument("--liger", action="store_true", help="norms, SwiGLU and RoPE by Liger's kernels")
    parser.add_argument("--parallel_mode", default="zigzag_ring_attn", choices=list(MODES))
    parser.add_argument("--ring_degree", type=int)
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing further is begun")
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    if args.new_tokens < 1:
        parser.error(f"--new-tokens is {args.new_tokens}: give at least 1, of which a step is timed")
    try:
        check_mode(args.parallel_mode, None, launched_processes(), args.ring_degree)
        if args.liger:
            check_liger(make_config(SHAPES[args.model]))
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if launched_processes() > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
            torch.cuda.set_device(device)
    try:
        rows = []
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        for row in measure(args, device):
            rows.append(row)
            if is_main:  # after each, since a later one may run out of memory or time
                path = write_results("generation", rows, args.output)
        if is_main:
            print_table(rows)
            print(path)
    finally:
        leave_processes()


if __name__ == "__main__":
    main()
