"""One LoRA or QLoRA step on a random model and one GPU: tokens/s, share of the ideal, peaks beside the predicted ones.

    python benchmarks/lora_step.py --model llama-2-7b --lora-r 32 --seq-lengths 102400
    python benchmarks/lora_step.py --model llama-33b --lora-r 64 --quantize nf4 --seq-lengths 102400
    python benchmarks/lora_step.py --model llama-3-8b --lora-r 32 --quantize nf4 --longest --layers 4
    python benchmarks/lora_step.py --model tiny --lora-r 4 --quantize nf4 --seq-lengths 256 --mlp-tile 64   # on a CPU

Weights are made on the GPU in bfloat16, and quantised there. Everything else is the train loop's: its step, loss,
optimizer, memory policy, and its flags (`--lora-targets`, `--optimizer paged_adamw_8bit`, `--keep-attention host`).
The first step is a warm-up on a short sequence. `--longest` adds the longest sequence that the policy finds to fit.

The ideal, with L tokens, n layers of q query values, N weights without the embedding: frozen weights take no gradient
of their own, so 2 N L FLOPs forward, 2 N L for the gradients of activations, 2 N L for linear layers once more;
attention is not computed again.

    seconds = 6 N L / 790e12 + 2 n q L^2 / 670e12 + 5 n q L^2 / 610e12

at an H200's best measured rates of products, of attention's forward and of its backward. `share_of_ideal` is against
this, whatever was recomputed in fact; `ideal_nothing_again` has 4 N L in place of 6 N L.

`--layers K` runs the last K layers of the model only (or a few more, up to one that keeps its input), and takes the
memory of the others beside them (`step_parts/layers_timed.py`). Such a row says so: `layers_timed`, `layers_accounted`;
`seconds_timed` is what was measured, and `seconds` that, times how much longer the whole model is predicted to take.
Its loss and gradient norm are those of the layers that ran.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from shared_parts.results_file import print_table, write_results
from step_parts.layers_timed import NO_PLAN, as_whole, check_room, last_layers, layers_to_run, room_now, take_ballast
from step_parts.lora_model import make_random, release
from step_parts.measure import measure_step
from step_parts.models import model_config
from step_parts.shapes import MODELS
from transformers import LlamaConfig

from easyctx.adapters.settings import AdapterSettings, check_adapter_engine, check_adapter_values
from easyctx.engine import make_accelerator
from easyctx.memory.budget import GIB, MemoryShape
from easyctx.memory.describe import OutOfMemory, describe_choices
from easyctx.modes import make_mode_mesh
from easyctx.train import train_step
from easyctx.training.flags import parse_arguments
from easyctx.training.memory import RunMemory, budget_now, decide_memory, explained_out_of_memory, longest_sequence
from easyctx.training.model import patch_model
from easyctx.training.optimizer import make_optimizer

GEMM, FORWARD, BACKWARD = 790e12, 670e12, 610e12  # FLOP/s of an H200 at best: products, attention's two directions
# What others published of the same shapes, on one GPU with 80 GB.
MARKS = {
    ("llama-2-7b", None): "Anima-100K: LoRA, 100K tokens",
    ("llama-33b", "nf4"): "Anima-33B: QLoRA, 1K tokens",
    ("llama-3-8b", "nf4"): "Unsloth: QLoRA, 342K tokens",
}
HIDDEN = ("choices", "moment", "published_on_80_gb", "ideal_tokens_per_s", "ideal_nothing_again", "reserved_gpu_gib")


def ideal_seconds(shape: MemoryShape, length: int, flops_a_weight: int = 6) -> float:
    weights = shape.parameters - shape.vocab * shape.hidden
    pairs = shape.num_layers * shape.q_width * float(length) ** 2
    return flops_a_weight * weights * length / GEMM + 2 * pairs / FORWARD + 5 * pairs / BACKWARD


class Bench:
    """A model of some of the layers, made anew where their number changes, and steps on it."""

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        fixed = ["--model", args.model, "--dataset", "random", "--output-dir", "unused", "--tracker", "none"]
        self.config = parse_arguments([*fixed, "--gradient-accumulate-every", "1", "--max-grad-norm", "0", *flags])
        if self.config.lora_r < 1:
            raise ValueError(f"--lora-r is {self.config.lora_r}: give a rank (train_step.py trains all weights)")
        on_gpu = torch.cuda.is_available()
        self.accelerator = make_accelerator(max_grad_norm=0.0, mixed_precision="bf16" if on_gpu else "no")
        if self.accelerator.num_processes > 1:
            raise ValueError(f"{self.accelerator.num_processes} processes were launched: this benchmark is of one GPU")
        settings = AdapterSettings.from_config(self.config)
        check_adapter_values(settings, self.config.optimizer, self.config.dtype, False)
        check_adapter_engine(settings, self.config.optimizer, self.accelerator)
        self.mesh = make_mode_mesh("data_parallel", None, None)
        self.name, self.layers = args.model, args.layers
        self.model: Any = None
        self.optimizer: Any = None
        # As at the start, for every length: later ones find pinned memory that is theirs to use again.
        budget = budget_now(self.config, self.accelerator.device)
        self.config.gpu_memory, self.config.host_memory = budget.gpu / GIB, budget.host / GIB
        self.room = room_now(self.accelerator.device)

    def longest(self) -> int:
        found = longest_sequence(self.config, model_config(self.name, None, 8192), self.accelerator, self.mesh)
        if not found:
            raise ValueError(f"--longest: {'no length fits' if found == 0 else 'memory is not planned on a CPU'}")
        return found

    def row(self, length: int) -> dict[str, Any]:
        """A step at this length; raises ValueError where it does not fit, OutOfMemory where it should have."""
        self.config.seq_length = length
        whole_config = model_config(self.name, None, length)
        whole = decide_memory(self.config, whole_config, self.accelerator, self.mesh)
        layers = whole_config.num_hidden_layers
        if self.layers and whole is None:
            raise ValueError(f"--layers {self.layers}: {NO_PLAN}")
        timed = min(self.layers or layers, layers)
        if whole is not None and timed < layers:
            check_room(whole, self.room)
            timed = layers_to_run([whole.decision], timed)
        hf_config = model_config(self.name, timed, length)
        self._build(hf_config)
        part, ballast = whole, None
        if whole is not None and timed < layers:
            part = last_layers(whole, hf_config)
            ballast = take_ballast(whole, part, self.accelerator.device)
        patch_model(self.model, self.config, part, self.accelerator, self.mesh)
        for line in whole.lines() if whole else ():
            print(f"easyctx: {line}", flush=True)
        row = self._measure(hf_config, length)
        del ballast
        return self._described(row, whole, part, whole_config, length)

    def _measure(self, hf_config: LlamaConfig, length: int) -> dict[str, Any]:
        ids = torch.randint(0, hf_config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

        def step(ids: torch.Tensor) -> tuple[float, float | None]:
            batches = iter([{"input_ids": ids}])
            with explained_out_of_memory(self.model):
                return train_step(
                    self.model, self.optimizer, batches, self.config, hf_config, self.accelerator, self.mesh
                )

        return measure_step(step, ids, 1, 0.0, self.accelerator.device, 1)

    def _build(self, hf_config: LlamaConfig) -> None:
        if self.model is not None and self.model.config.num_hidden_layers == hf_config.num_hidden_layers:
            return
        self.model = self.optimizer = None
        self.accelerator.free_memory()
        release()
        model = make_random(hf_config, self.config, self.accelerator)
        optimizer = make_optimizer(model, self.config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _described(
        self, row: dict[str, Any], whole: RunMemory | None, part: RunMemory | None, whole_config: Any, length: int
    ) -> dict[str, Any]:
        config, shape = self.config, MemoryShape.from_config(whole_config)
        kind = f"QLoRA {config.quantize}" if config.quantize else "LoRA"
        timed = self.model.config.num_hidden_layers
        row.pop("mfu")
        if whole is not None and part is not None:
            row = as_whole(row, whole, part, length, "data_parallel")
        seconds = row["seconds"]
        row |= {
            "share_of_ideal": ideal_seconds(shape, length) / seconds if torch.cuda.is_available() else None,
            "ideal_tokens_per_s": length / ideal_seconds(shape, length),
            "ideal_nothing_again": length / ideal_seconds(shape, length, 4),
        }
        if whole is not None:
            predicted = whole.decision.predicted
            row |= {
                "predicted_gpu_gib": predicted.gpu_peak / GIB,
                "predicted_host_gib": predicted.host_peak / GIB,
                "moment": predicted.moment,
                "choices": describe_choices(whole.decision.choices),
                "kernel": whole.setting.kernel,
            }
        head = {
            "method": f"easyctx {kind} r={config.lora_r} {config.optimizer}",
            "model": self.name,
            "gpus": 1,
            "seq_length": length,
            "layers_timed": timed,
            "layers_accounted": shape.num_layers - timed,
            "published_on_80_gb": MARKS.get((self.name, config.quantize)),
        }
        return head | row


def run(args: argparse.Namespace, flags: list[str]) -> list[dict[str, Any]]:
    """A row for each length, written as it comes."""
    bench, rows = Bench(args, flags), []
    lengths = [*args.seq_lengths, *([bench.longest()] if args.longest else [])]
    for number, length in enumerate((args.warmup_length, *lengths)):
        try:
            row = bench.row(length)
        except (ValueError, OutOfMemory) as error:
            row = {"model": args.model, "gpus": 1, "seq_length": length, "error_message": str(error)}
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if number:
            rows.append(row)
            path = write_results(args.name, rows, args.output)
            print(path, flush=True)
        if "error_message" in row and not number:
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="run so many of the last layers; take the others' memory beside")
    parser.add_argument("--seq-lengths", type=int, nargs="*", default=[])
    parser.add_argument("--longest", action="store_true", help="also the longest sequence that fits")
    parser.add_argument("--warmup-length", type=int, default=8192)
    parser.add_argument("--name", default="lora_step", help="of the result file")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    args, flags = parser.parse_known_args()
    if not (args.seq_lengths or args.longest):
        parser.error("give --seq-lengths or --longest")
    try:
        rows = run(args, flags)
    except ValueError as error:
        parser.error(str(error))
    if rows:
        print_table([{k: v for k, v in row.items() if k not in HIDDEN} for row in rows])


if __name__ == "__main__":
    main()
