"""LoRA on rows of 30K to 100K tokens in one run, and the next token behind 100K tokens with and without a KV cache.

    python benchmarks/lora_lengths.py --layers 8 --liger                                  # llama-2-7b's shape, one GPU
    torchrun --nproc-per-node 2 benchmarks/lora_lengths.py --layers 8 --parallel_mode zigzag_ring_attn
    python benchmarks/lora_lengths.py --model tiny --shortest 40 --longest 200 --answer 8 --steps 6      # on a CPU

The model is random; everything else is the train loop's: the rows go through its loader, which pads each to one of
`--buckets` lengths, its memory policy, step and optimizer. Further flags are the train loop's (`--lora-r`).
Of each row only the last `--answer` tokens are targets. The shortest and the longest row come third and fourth, and
again as the last two steps, so that a length's first visit stands beside its second.

`compiled` counts kernels that were compiled, or read from a compiler's cache on disk, during a step. `retries` counts
how often PyTorch's allocator had to give memory back before it could go on, as where memory is fragmented. A step's
`reserved_gib` holds what longer steps before it left; `reserved_over_allocated_gib` is the difference of the run's two
peaks. Ranks' figures are the first rank's.
The model generates with its adapters as the steps left them.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from datasets import Dataset
from shared_parts.random_models import NoText
from shared_parts.results_file import print_table, write_results
from step_parts.compiled import Compiled
from step_parts.lora_model import make_random, release
from step_parts.measure import allocator_retries, reset_peaks, synchronize
from step_parts.models import model_config
from step_parts.shapes import MODELS

from easyctx.adapters.settings import AdapterSettings, check_adapter_engine, check_adapter_values
from easyctx.data.load import row_lengths
from easyctx.engine import launched_processes, make_accelerator
from easyctx.generation import Generator
from easyctx.generation.calls import Call
from easyctx.head import inner_model
from easyctx.memory.budget import GIB
from easyctx.mesh import leave_processes
from easyctx.modes import check_mode, make_mode_mesh
from easyctx.train import train_step
from easyctx.training.buckets import Buckets
from easyctx.training.data import checked_rows, make_loader
from easyctx.training.flags import parse_arguments
from easyctx.training.memory import decide_memory, explained_out_of_memory
from easyctx.training.model import patch_model
from easyctx.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from easyctx.training.order import GlobalOrder
from easyctx.training.samples import longest_chunk, set_aside

Row = dict[str, Any]
WARM_UP = 2  # steps in which compiling is no wonder


def lengths_of_steps(shortest: int, longest: int, steps: int) -> list[int]:
    """Odd lengths, shuffled: the extremes are steps 3 and 4, and once more the last two."""
    between = steps - 4
    gap = (longest - shortest) / (between + 1)
    middle = [int(shortest + gap * (number + 1)) | 1 for number in range(between)]
    random.Random(0).shuffle(middle)
    extremes = [shortest | 1, (longest - 1) | 1]
    return [*middle[:WARM_UP], *extremes, *middle[WARM_UP:], *extremes]


def make_rows(lengths: list[int], answer: int, vocab: int, seed: int) -> Dataset:
    """Random rows whose order under the train loop's shuffle is that of `lengths`; targets are the last `answer`."""
    order, generator = GlobalOrder(len(lengths), seed, 1, 0, 1), torch.Generator().manual_seed(0)
    rows: list[Row] = [{}] * len(lengths)
    for sample, length in enumerate(lengths):
        ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
        rows[order.row(sample)] = {"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]}
    return Dataset.from_list(rows)


class Run:
    """A model of the asked shape, ready to be trained on the rows."""

    def __init__(self, args: argparse.Namespace, config: Any) -> None:
        self.args, self.config = args, config
        on_gpu = torch.cuda.is_available()
        self.accelerator = make_accelerator(
            max_grad_norm=config.max_grad_norm, mixed_precision="bf16" if on_gpu else "no"
        )
        check_adapter_engine(AdapterSettings.from_config(config), config.optimizer, self.accelerator)
        self.device = self.accelerator.device
        self.mesh = make_mode_mesh(config.parallel_mode, config.sp_degree, config.ring_degree)
        self.hf_config = model_config(args.model, args.layers, config.seq_length)
        self.memory = decide_memory(config, self.hf_config, self.accelerator, self.mesh)
        for line in self.memory.lines() if self.memory else ():
            self.accelerator.print(f"easyctx: {line}", flush=True)
        self.compiled = Compiled()
        model = make_random(self.hf_config, config, self.accelerator)
        patch_model(model, config, self.memory, self.accelerator, self.mesh)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, config))
        self.model.train()

    def steps(self) -> list[Row]:
        """A row for each optimizer step."""
        config, vocab = self.config, self.hf_config.vocab_size
        lengths = lengths_of_steps(self.args.shortest, self.args.longest, self.args.steps)
        made = make_rows(lengths, self.args.answer, vocab, config.seed)
        rows = checked_rows(config, made, "random", config.seq_length, vocab)
        padded = Buckets(config, row_lengths(rows), self.mesh).padded if config.buckets else int
        batches = iter(make_loader(rows, config, self.mesh))
        found = []
        for step, length in enumerate(lengths):
            set_learning_rate(self.optimizer, learning_rate(config, step))
            row = {"part": "step", "step": step + 1, "tokens": length, "padded_to": padded(length)}
            row |= self._step(batches) | {"visit": lengths[: step + 1].count(length)}
            self.accelerator.print(row, flush=True)
            found.append(row)
        return found

    def _step(self, batches: Any) -> Row:
        before, retries = self.compiled.now(), allocator_retries()
        reset_peaks()
        synchronize(self.device)
        begin = time.perf_counter()
        with explained_out_of_memory(self.model):
            loss, norm = train_step(
                self.model, self.optimizer, batches, self.config, self.hf_config, self.accelerator, self.mesh
            )
        synchronize(self.device)
        seconds = time.perf_counter() - begin
        fresh = {name: count - before[name] for name, count in self.compiled.now().items()}
        return {"seconds": seconds, **peaks(), "compiled": fresh, "retries": allocator_retries() - retries,
                "loss": loss, "grad_norm": norm}  # fmt: skip

    def generation(self) -> list[Row]:
        """The tokens behind a prompt of the longest length, with a KV cache and without, and how they differ."""
        args = self.args
        ids = torch.randint(0, self.hf_config.vocab_size, (args.longest,), generator=torch.Generator().manual_seed(1))
        inner_model(self.model).generation_config.eos_token_id = None  # all answers have the full length
        rows, answers = [], []
        for use_cache in (True, False):
            release()
            with set_aside(self.model):
                generator = NotedGenerator(
                    self.model,
                    NoText(),
                    self.config.parallel_mode,
                    self.mesh,
                    longest_chunk(self.model),
                    use_cache=use_cache,
                )
                seconds = []
                for new_tokens in (1, args.new_tokens):  # the first compiles kernels; both give the first token alike
                    generator.noted = []
                    reset_peaks()
                    synchronize(self.device)
                    begin = time.perf_counter()
                    (answer,) = generator.answer(ids.tolist(), max_new_tokens=new_tokens)
                    synchronize(self.device)
                    seconds.append(time.perf_counter() - begin)
            answers.append((answer.token_ids, torch.cat(generator.noted)))
            rows.append({"part": "generation", "kv_cache": use_cache, "tokens": args.longest,
                         "seconds_first_token": seconds[0], "new_tokens": len(answer.token_ids),
                         "seconds": seconds[1], **peaks(), "token_ids": answer.token_ids})  # fmt: skip
            self.accelerator.print(rows[-1], flush=True)
        return [*rows, difference(*answers)]


class NotedGenerator(Generator):
    """Notes the logits that each token was chosen by."""

    noted: list[torch.Tensor]

    def _run(self, call: Call, rows: list[int]) -> torch.Tensor:
        logits = super()._run(call, rows)
        if rows:
            self.noted.append(logits.float().cpu())
        return logits


def difference(with_cache: tuple[list[int], torch.Tensor], without: tuple[list[int], torch.Tensor]) -> Row:
    """Of the tokens `[n]` and their logits `[n, V]`; logits only as far as the texts before them are the same."""
    (tokens, logits), (others, other_logits) = with_cache, without
    same = next((i for i, (one, other) in enumerate(zip(tokens, others, strict=True)) if one != other), len(tokens))
    comparable = min(same + 1, len(tokens))
    return {
        "part": "cache against none",
        "same_tokens": same,
        "of_tokens": len(tokens),
        "largest_logit_difference": float((logits - other_logits)[:comparable].abs().max()),
        "largest_logit": float(logits[:comparable].abs().max()),
    }


def peaks() -> Row:
    """GiB since `reset_peaks`."""
    if not torch.cuda.is_available():
        return {"allocated_gib": None, "reserved_gib": None}
    allocated, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return {"allocated_gib": allocated, "reserved_gib": reserved}


def summary(steps: list[Row]) -> Row:
    """Of all steps: compiled after the warm-up, retries, and each repeated length's seconds by visit."""
    visits: dict[int, list[float]] = {}
    for row in steps:
        visits.setdefault(row["tokens"], []).append(row["seconds"])
    late, on_gpu = steps[WARM_UP:], torch.cuda.is_available()

    def most(name: str) -> float:
        return max(row[name] for row in steps)

    return {
        "part": "all steps",
        "compiled_after_second_step": {
            name: sum(row["compiled"][name] for row in late) for name in late[0]["compiled"]
        },
        "allocator_retries": sum(row["retries"] for row in steps),
        "seconds_by_visit": {str(length): seconds for length, seconds in visits.items() if len(seconds) > 1},
        "reserved_over_allocated_gib": most("reserved_gib") - most("allocated_gib") if on_gpu else None,
    }


def read_config(args: argparse.Namespace, flags: list[str], folder: str) -> Any:
    """The train loop's settings, checked.

    Raises:
        ValueError: lengths, steps or flags that cannot be.
    """
    if not 2 <= args.answer < args.shortest < args.longest - 1:
        raise ValueError(
            f"--answer {args.answer}, --shortest {args.shortest} and --longest {args.longest}: give 2 or more, each "
            "longer than the one before, the last by 2 at least"
        )
    for name, value, least in (("steps", args.steps, 6), ("new-tokens", args.new_tokens, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}: give at least {least}")
    if args.layers is not None and args.layers < 1:
        raise ValueError(f"--layers is {args.layers}: give at least 1, or leave it out for all")
    fixed = ["--model", args.model, "--dataset", "random", "--output-dir", folder, "--tracker", "none"]
    fixed += ["--seq-length", str(args.longest), "--max-train-steps", str(args.steps), "--weight-decay", "0"]
    own = ["--gradient-accumulate-every", "1", "--buckets", "8", "--lora-r", "32", "--parallel_mode", "data_parallel"]
    config = parse_arguments([*fixed, *own, *flags])
    world = launched_processes()
    degree = check_mode(config.parallel_mode, config.sp_degree, world, config.ring_degree)
    if config.lora_r < 1:
        raise ValueError(f"--lora-r is {config.lora_r}: give a rank")
    if degree != world or config.batch_size * config.gradient_accumulate_every != 1:
        raise ValueError(
            f"a step is one row here, shared among all processes: {world} were launched, {degree} share a row, with "
            f"--batch-size {config.batch_size} and --gradient-accumulate-every {config.gradient_accumulate_every}"
        )
    check_adapter_values(AdapterSettings.from_config(config), config.optimizer, config.dtype, degree > 1)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="make so many of the model's layers (default: all)")
    parser.add_argument("--shortest", type=int, default=30720, help="tokens of the shortest row")
    parser.add_argument("--longest", type=int, default=102400, help="tokens of the longest, and of the prompt")
    parser.add_argument("--answer", type=int, default=1024, help="tokens at a row's end that are targets")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=3, help="chosen behind the prompt")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = read_config(args, flags, folder)
            run = Run(args, config)
        except ValueError as error:
            parser.error(str(error))
    head = {"model": args.model, "layers": run.hf_config.num_hidden_layers, "gpus": launched_processes(),
            "method": f"{config.parallel_mode}, LoRA r={config.lora_r}{', --liger' * config.liger}"}  # fmt: skip
    try:
        steps = run.steps()
        rows = [*steps, summary(steps)]
        # Written before generation too, which may run out of time.
        for further in (list, run.generation):
            rows += further()
            if run.accelerator.is_main_process:
                path = write_results("lora_lengths", [head | row for row in rows], args.output)
        if run.accelerator.is_main_process:
            print_table(steps)
            print(rows[len(steps)], rows[-1], path, sep="\n")
    finally:
        leave_processes()


if __name__ == "__main__":
    main()
