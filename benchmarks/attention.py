"""Attention over several GPUs: easyctx's modes, other packages, and the local kernels alone, on the same work.

    torchrun --nproc-per-node 2 benchmarks/attention.py [--tokens-per-gpu 8192 65536] [--heads 32/8 32/32]
    python benchmarks/attention.py --loopback 8 [--tokens-per-gpu 8192 65536]

Every method computes the same sequence under the same mask, forward and backward, batch 1. FLOPs are those of the
pairs that the mask leaves (backward 2.5 x forward), an even share for each GPU, also where a method spreads them
unevenly or computes more. Times are medians over repeats of the slowest rank.

`local kernel` rows are one device's kernel as its library gives it, causal, at the length that has as many FLOPs as a
GPU's share; `share_of_local` is a method's rate over that of the same kernel, and `exposed_ms` the time that this rate
does not explain: messages that were not hidden, merges, launches, uneven work. `error` is the largest of the relative
errors of out, dq, dk and dv against float64, from a sample of query rows (attention_parts/sample.py). What failed, or
does not import here, is a row with `error_message`.

--loopback P needs one device only: it plays the busiest rank of P, and messages are copies on it, so what is
measured is a mode without a network (attention_parts/loopback.py); its FLOPs are those of that rank.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_parts.cases import BACKWARD, MASKS, Case, make_mask
from attention_parts.chart import draw
from attention_parts.loopback import loopback
from attention_parts.methods import LOCAL, Method, local_kernel, own_mode
from attention_parts.rivals import FA2, RIVAL_KERNELS, RIVALS
from attention_parts.sample import largest, sampled_errors
from attention_parts.timing import measure, profile
from shared_parts.results_file import print_table, write_results
from tqdm import tqdm

from easyctx.engine import make_accelerator
from easyctx.kernel import KERNEL_CHOICES, KERNELS, get_kernel
from easyctx.mesh import divisors, leave_processes, num_processes
from easyctx.modes import MODES

Row = dict[str, Any]
OWN_MODES = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
SHOWN = ["method", "kernel", "mask", "q_heads", "kv_heads", "gpus", "tokens_per_gpu", "ms", "forward_ms"]
SHOWN += ["backward_ms", "tflops_per_gpu", "share_of_local", "exposed_ms", "peak_gib", "error", "error_message"]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [*OWN_MODES, *RIVALS]
    parser.add_argument("--tokens-per-gpu", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--heads", nargs="+", default=["32/8"], metavar="Q/KV", help="32/8: Llama-3-8B; 32/32: Llama-2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--masks", nargs="+", default=["causal"], choices=MASKS)
    parser.add_argument("--window", type=int, default=4096, help="tokens that a query sees under the mask window")
    parser.add_argument("--documents", type=int, default=16, help="in the sequence under the mask packed")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, metavar="METHOD")
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=KERNEL_CHOICES, help="of easyctx's modes")
    parser.add_argument("--ring-degree", type=int, help="of usp_attn; default: the smallest above 1 that divides")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of repeats to a method, after its warm-up")
    parser.add_argument("--sample-rows", type=int, default=64, help="query rows for the error; 0: no errors")
    parser.add_argument("--loopback", type=int, metavar="P", help="one device plays one of P ranks")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="also write where each method's time goes")
    parser.add_argument("--output", type=Path, help="folder of the result file and its chart")
    args = parser.parse_args(argv)
    try:
        args.heads = [tuple(map(int, heads.split("/"))) for heads in args.heads]
        valid = all(len(pair) == 2 and min(pair) > 0 and pair[0] % pair[1] == 0 for pair in args.heads)
    except ValueError:
        valid = False
    if not valid:
        parser.error("--heads takes query/key-value heads such as 32/8, the first a multiple of the second")
    if args.loopback is not None and args.loopback < 2:
        parser.error(f"--loopback {args.loopback}: a rank has at least one other, give 2 or more")
    return args


def cases(args: argparse.Namespace, ranks: int, device: torch.device) -> Iterator[Case]:
    for heads in args.heads:
        for tokens in args.tokens_per_gpu:
            for name in args.masks:
                mask = make_mask(name, tokens * ranks, args.window, args.documents)
                yield Case(heads, args.head_dim, getattr(torch, args.dtype), device, ranks, tokens, name, mask)


class Bench:
    """Runs methods on cases, and keeps a row for each. All ranks do the same in the same order."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.rank = dist.get_rank() if num_processes() > 1 else 0
        self.rows: list[Row] = []
        self.local_rates: dict[str, float] = {}  # FLOP/s by kernel, of the case at hand

    def run(self, case: Case, bar: tqdm) -> None:
        """All methods on a case, the local kernels first."""
        kernels = self._kernels(case)
        rivals = [] if self.args.loopback else [name for name in self.args.methods if name in RIVALS]
        self.local_rates = {}
        others = {RIVAL_KERNELS.get(name, FA2) for name in rivals}
        for kernel in dict.fromkeys([*kernels, *sorted(others)]):
            if KERNELS[kernel].refuses(case.one_device(1).workload) is None:
                self._step(bar, LOCAL, kernel, case, self._local)
        for name in (name for name in self.args.methods if name in OWN_MODES):
            for kernel in kernels:
                self._step(bar, name, kernel, case, self._looped if self.args.loopback else self._own)
        for name in rivals:
            self._step(bar, name, RIVAL_KERNELS.get(name, FA2), case, self._rival)

    def _kernels(self, case: Case) -> list[str]:
        """The kernels asked for, "auto" by the name of what it is here."""
        names = (get_kernel(n, case.workload).name if n == "auto" else n for n in self.args.kernels)
        return list(dict.fromkeys(names))

    def _step(self, bar: tqdm, name: str, kernel: str, case: Case, job: Callable[[str, str, Case], Row]) -> None:
        """Add the row of one method; if it fails on any rank, the reason."""
        bar.set_description(f"{name} {case.mask_name} {case.tokens}")
        result, message = {}, None
        try:
            result = job(name, kernel, case)
        except Exception as error:  # whatever another package may raise is its row
            message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        messages = [message]
        if num_processes() > 1:
            messages = [None] * num_processes()
            dist.all_gather_object(messages, message)
        if any(messages):
            result = {"error_message": next(text for text in messages if text)}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        ranks = {"ranks": self.args.loopback, "transport": "loopback"} if self.args.loopback else {}
        described = {
            "method": name,
            "kernel": kernel,
            "mask": case.mask_name,
            "q_heads": case.heads[0],
            "kv_heads": case.heads[1],
            "head_dim": case.head_dim,
            "dtype": self.args.dtype,
            "gpus": 1 if self.args.loopback or name == LOCAL else case.ranks,
            "tokens_per_gpu": case.tokens,
        }
        self.rows.append(described | ranks | result)
        bar.update()

    def _local(self, name: str, kernel: str, case: Case) -> Row:
        alone = case.one_device(case.pairs() / case.ranks)
        row = self._figures(local_kernel(kernel), alone, 0, alone.pairs())
        self.local_rates[kernel] = row["tflops_per_gpu"]
        # The mask and length of the row are those of the case; what was run is another, causal one.
        return row | {"share_of_local": 1.0, "exposed_ms": 0.0, "local_tokens": alone.tokens}

    def _own(self, name: str, kernel: str, case: Case) -> Row:
        if reason := KERNELS[kernel].refuses(case.workload):
            raise ValueError(f"kernel {kernel} {reason}")
        method = own_mode(name, kernel, case, self._ring_degree(case))
        return self._figures(method, case, self.rank, case.pairs() / case.ranks)

    def _looped(self, name: str, kernel: str, case: Case) -> Row:
        if reason := KERNELS[kernel].refuses(case.workload):
            raise ValueError(f"kernel {kernel} {reason}")
        MODES[name].check_heads(*case.heads, case.ranks, self._ring_degree(case) if name == "usp_attn" else None)
        method, rank, pairs = loopback(name, kernel, case, self._ring_degree(case))
        return self._figures(method, replace(case, ranks=1), 0, pairs, errors=False) | {"rank": rank}

    def _rival(self, name: str, kernel: str, case: Case) -> Row:
        method = RIVALS[name](name, case, self._ring_degree(case))
        return self._figures(method, case, self.rank, case.pairs() / case.ranks)

    def _ring_degree(self, case: Case) -> int:
        return self.args.ring_degree or divisors(case.ranks)[1]

    def _figures(self, method: Method, case: Case, rank: int, pairs: float, errors: bool = True) -> Row:
        """Times, rates, memory and errors. pairs: of this GPU, in each query head."""
        tensors = case.shards(method.layout, rank)
        found = measure(method, tensors, self.args.seconds)
        if self.args.profile:
            name = f"{method.name}_{method.kernel}_{case.mask_name}_{case.tokens}_rank{self.rank}.txt"
            profile(method, tensors, self.args.profile / name.replace(" ", "_"))
        del tensors
        flops = case.forward_flops(pairs) * (1 + BACKWARD)
        row: Row = {
            "ms": found.ms,
            "forward_ms": found.forward_ms,
            "backward_ms": found.backward_ms,
            "ms_min": found.ms_min,
            "ms_max": found.ms_max,
            "repeats": found.repeats,
            "tflops_per_gpu": flops / found.ms / 1e9,
            "peak_gib": found.peak_gib,
        }
        if local := self.local_rates.get(method.kernel):
            row["share_of_local"] = row["tflops_per_gpu"] / local
            row["exposed_ms"] = found.ms - flops / local / 1e9
        if errors and self.args.sample_rows:
            row |= largest(sampled_errors(method, case, rank, self.args.sample_rows))
        return row


def main() -> int:
    args = parse_arguments()
    accelerator = make_accelerator()
    ranks = args.loopback or num_processes()
    if (num_processes() > 1) == bool(args.loopback):
        if accelerator.is_main_process:
            print(
                f"error: this is a run of {num_processes()} process(es): give --loopback P (one device plays a rank of "
                "P) to one, or launch several with torchrun --nproc-per-node N and leave --loopback out",
                file=sys.stderr,
            )
        return 2
    bench = Bench(args, accelerator.device)
    with tqdm(desc="attention", unit=" methods", disable=not accelerator.is_main_process) as bar:
        for case in cases(args, ranks, accelerator.device):
            bench.run(case, bar)
            if accelerator.is_main_process:  # after each, since a later one may run out of memory or time
                path = write_results("attention", bench.rows, args.output)
    if accelerator.is_main_process:
        print_table(bench.rows, SHOWN)
        chart = draw(bench.rows, path.with_suffix(".png"))
        print(path if chart is None else f"{path}\n{chart}")
    leave_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
