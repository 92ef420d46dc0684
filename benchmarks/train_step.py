"""One full fine-tuning step on a random model, ours and others': tokens/s, peak memory, loss, gradient norm.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \\
        benchmarks/train_step.py --model llama-3-8b --seq-lengths 65536 131072
    python benchmarks/train_step.py --model tiny --seq-lengths 256    # on a CPU

Methods, one after the other, each in processes of its own, so that one which runs out of memory leaves the others be:

    easyctx              `--parallel_mode` (zigzag_ring_attn), everything as the train loop decides it
    easycontext          EasyContext's recipe on today's stack: ring-flash-attn's zigzag over FlashAttention 2, all
                         layers recomputed; on one GPU FlashAttention 2 alone
    easycontext_offload  the same with the layers' inputs on the host
    context_parallel     PyTorch's context_parallel (cuDNN), all recomputed; on one GPU cuDNN alone
    alst                 DeepSpeed's: Ulysses (cuDNN), ZeRO-3, tiled MLP, all recomputed; its own engine, whatever
                         the launch has

All have the same random weights and tokens, and a fused loss (Liger's for others than easyctx, where it is installed),
so loss and gradient norm must agree; a row that does not says so under `disagrees`. What is not installed, does not fit
or fails is a row with `error_message`. The first step is a warm-up on a short sequence: kernels compile, the optimizer
makes its state. Of `--steps` steps at each length the fastest counts, since cuDNN plans anew for every length. The
learning rate is 0, which takes Adam as long and leaves the weights.

`--layers-timed K` (for easyctx alone) decides for the whole model, runs its last K layers (or a few more, up to one
that keeps its input), and takes the memory of the others beside them, on the GPU and on the host
(`step_parts/layers_timed.py`). Such a row says so: `layers_timed`, `layers_accounted`; `seconds_timed` is what was
measured, `seconds` that, times how much longer the whole model is predicted to take; `seconds_of_steps` stays
as measured. Its loss and gradient norm are those of the layers that ran.

    accelerate launch --config_file accelerate_configs/fsdp2_offload.yaml --num_processes 1 \\
        benchmarks/train_step.py --model llama-3-8b --seq-lengths 524288 --layers-timed 2 --methods easyctx --steps 1

All further flags are the train loop's and hold for easyctx alone: `--mlp-tile 8192 --keep-attention host` and so on.
Each length is planned for by itself, with the GPU memory that was free at the start.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from shared_parts.results_file import this_command
from step_parts.child import Ranks
from step_parts.rows import add_row, compared, failed_rows, read_rows
from step_parts.shapes import MODELS
from tqdm import tqdm

Row = dict[str, Any]
METHODS = ("easyctx", "easycontext", "easycontext_offload", "context_parallel", "alst")
SHOWN = ["method", "model", "layers", "layers_timed", "gpus", "seq_length", "seconds", "seconds_timed"]
SHOWN += ["tokens_per_s", "peak_gpu_gib", "peak_host_gib", "mfu", "loss", "grad_norm", "disagrees", "error_message"]


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those of the train loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="in place of the model's own number")
    parser.add_argument(
        "--layers-timed", type=int, help="run so many of the last layers; take the others' memory beside"
    )
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[65536])
    parser.add_argument("--warmup-length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2, help="at each length, of which the fastest counts")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that all lengths of a method may take")
    parser.add_argument("--output", type=Path, help="folder of the result file and its chart")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # folder of a child of this very program
    args, flags = parser.parse_known_args(argv)
    if any(number < 1 for number in (*args.seq_lengths, args.warmup_length, args.steps)):
        parser.error("--seq-lengths, --warmup-length and --steps are counts: give 1 or more")
    if args.layers_timed is not None and args.layers_timed < 1:
        parser.error(f"--layers-timed is {args.layers_timed}, and at least 1 layer is to run")
    if args.layers_timed is not None and args.methods != ["easyctx"]:
        others = ", ".join(method for method in args.methods if method != "easyctx")
        parser.error(
            f"--layers-timed leaves out layers that easyctx has planned for; other methods ({others}) plan nothing: "
            "add --methods easyctx, or give all methods fewer layers with --layers"
        )
    args.seq_lengths = sorted(set(args.seq_lengths))
    args.warmup_length = min(args.warmup_length, args.seq_lengths[0])
    return args, flags


def run_all(args: argparse.Namespace, folder: Path) -> list[Row]:
    """All methods' rows, on rank 0. No GPU is touched here, all of its memory is the children's."""
    ranks = Ranks()
    with tqdm(args.methods, desc="train_step", unit=" methods", disable=ranks.rank > 0) as bar:
        for method in bar:
            bar.set_postfix_str(method)
            command = [sys.executable, __file__, *sys.argv[1:], "--methods", method, "--child", str(folder)]
            failure = ranks.run(method, command, folder, args.timeout)
            if failure is not None and ranks.rank == 0:
                for row in failed_rows(args, method, read_rows(folder), failure):
                    add_row(folder, row)
                    tqdm.write(f"{method}: {row['seq_length']} tokens: {row['error_message']}")
    return read_rows(folder) if ranks.rank == 0 else []


def main() -> int:
    args, flags = parse_arguments()
    if args.child is not None:
        from step_parts.run import run_method

        return run_method(args, flags)
    if flags:  # before anything is started
        from step_parts.settings import step_settings

        step_settings(args, flags)
    os.environ.setdefault("EASYCTX_COMMAND", this_command())  # as children write it, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended on the way out
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(run_all(args, Path(folder)))
    if rows:
        # Only now: they look at the GPU, all of which was the children's.
        from shared_parts.results_file import print_table, write_results
        from step_parts.chart import draw

        path = write_results("train_step", rows, args.output)
        print_table(rows, [name for name in SHOWN if any(name in row for row in rows)])
        chart = draw(rows, path.with_suffix(".png"))
        print(path if chart is None else f"{path}\n{chart}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
