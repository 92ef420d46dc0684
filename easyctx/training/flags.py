"""The train loop's flags: the command line as a configuration."""

import argparse
from collections.abc import Callable
from typing import Any

from easyctx.adapters.settings import LORA_TRAIN, OPTIMIZERS, QUANTIZE
from easyctx.backend import BACKENDS, OWN
from easyctx.cost.choose import AUTO
from easyctx.kernel import KERNEL_CHOICES
from easyctx.modes import MODES
from easyctx.parser import Parser
from easyctx.training.config import (
    DTYPES,
    LOSSES,
    RECOMPUTE,
    ROPE_SCALINGS,
    SAVE_DTYPES,
    SCHEDULES,
    TRACKERS,
    TrainConfig,
)

Flag = Callable[..., None]


def parse_arguments(argv: list[str] | None = None, parser_class: type[argparse.ArgumentParser] = Parser) -> TrainConfig:
    """The command line as a configuration. Unknown flags and bad values exit with status 2.

    That is the parser's `error`; a class with another one may be given.
    """
    parser = parser_class(
        prog="easyctx.train", description="Train a causal LM on sequences that are sharded over processes."
    )
    for title, add_flags in GROUPS.items():
        add_flags(_flags_of(parser.add_argument_group(title)))
    config = TrainConfig(**vars(parser.parse_args(argv)))
    if config.wandb:
        config.tracker = "wandb"
    return config


def _flags_of(group: argparse._ArgumentGroup) -> Flag:
    """Adds a flag under its spellings with - and _, and says its default."""

    def flag(name: str, help: str, **kwargs: Any) -> None:
        names = {f"--{name}", f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}"}
        default = kwargs.get("default")
        if default is not None and "default" not in help and "auto is" not in help:
            help += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
        group.add_argument(*sorted(names), dest=name.replace("-", "_"), help=help, **kwargs)

    return flag


def _run(flag: Flag) -> None:
    flag("model", "folder or hub name of the model to start from", required=True)
    flag("dataset", "folder made by `easyctx data`, or a hub name; rows of `input_ids`", required=True)
    flag("output-dir", "folder for weights, tokenizer and logs; new or empty", required=True)
    flag("batch-size", "sequences to a micro-batch of one data-parallel rank", type=int, default=1)
    flag("gradient-accumulate-every", "micro-batches to an optimizer step", type=int, default=8)
    flag("max-train-steps", "optimizer steps", type=int, default=400)
    flag("learning-rate", "peak learning rate; its only source", type=float, default=2e-5)
    flag("lr-schedule", "course of the learning rate after the warm-up", choices=SCHEDULES, default="constant")
    flag("warmup-steps", "steps over which the learning rate rises linearly", type=int, default=0)
    flag("weight-decay", "AdamW's weight decay", type=float, default=0.1)
    flag("adam-betas", "AdamW's two betas", type=float, nargs=2, default=[0.9, 0.95])
    flag("max-grad-norm", "clip the global gradient norm to this; 0 does not clip", type=float, default=1.0)
    flag("seq-length", "tokens to a sequence, over all ranks that share it", type=int, default=16384)
    flag(
        "buckets",
        "rows may be shorter than --seq-length: each batch is padded to one of at most so many lengths, which are "
        "spread geometrically; 0 refuses such rows",
        type=int,
        default=0,
    )
    flag("pose-length", "PoSE: spread the positions of each row, with skips, over a range of so many", type=int)
    flag("liger", "norms, SwiGLU and RoPE by Liger's kernels (pip install liger-kernel)", action="store_true")
    flag("dtype", "of the weights in training (auto: what the engine wants)", choices=DTYPES, default="auto")
    flag("seed", "seeds the shuffle of the data and everything else", type=int, default=42)
    flag(
        "tracker",
        "where metrics are logged besides the progress bar",
        choices=TRACKERS,
        default="tensorboard",
    )
    flag("wandb", "wandb project name; the same as --tracker wandb", default=None)
    flag("ignore-borders", "attend across the document borders that the dataset records", action="store_true")
    flag("overwrite", "write over the run in --output-dir", action="store_true")


def _positions(flag: Flag) -> None:
    flag("rope-theta", "new RoPE base; also written into the saved config", type=float, default=None)
    flag("rope-scaling", "scale RoPE frequencies by this method, with --rope-factor", choices=ROPE_SCALINGS)
    flag("rope-factor", "how many times the length the model was made for the method is to reach", type=float)


def _parallelism(flag: Flag) -> None:
    flag(
        "parallel_mode",
        "how attention is spread; auto takes the mode that is predicted to be fastest",
        choices=(AUTO, *MODES),
        default="data_parallel",
    )
    flag("sp-degree", "processes that share one sequence (default: all; the rest is data parallel)", type=int)
    flag("ring_degree", "how many of them form the ring, for usp_attn; the rest is Ulysses", type=int)
    flag(
        "attn-kernel",
        "attention kernel; data_parallel on a CPU takes the model's own unless one is named",
        choices=KERNEL_CHOICES,
        default="auto",
    )
    flag(
        "attn-backend",
        "attention of another package, for comparison: ring_flash_attn (ring, zigzag, striped) or yunchang (Ulysses, "
        "USP)",
        choices=BACKENDS,
        default=OWN,
    )


def _memory(flag: Flag) -> None:
    # Of `--memory auto`, each choice can be forced by its own flag.
    flag(
        "memory",
        "auto decides what each layer keeps, and where, so that the sequence fits with the least to compute again; "
        "off leaves the model as it is. Without a GPU, auto is off unless one of the flags below is given",
        choices=("auto", "off"),
        default="auto",
    )
    flag(
        "recompute",
        "activations made again in the backward: none, all, or all but attention",
        choices=RECOMPUTE,
        default="auto",
    )
    flag("keep-inputs", "where layers' inputs are kept", choices=("auto", "gpu", "host"), default="auto")
    flag(
        "keep-attention",
        "where attention's results are kept, or that it runs again",
        choices=("auto", "gpu", "host", "recompute"),
        default="auto",
    )
    flag("checkpoint-every", "layers to a kept input; the inputs between are made again", type=int, default=None)
    flag("mlp-tile", "tokens of a tile of the MLP; 0 for all at once", type=int, default=None)
    flag("tiled-norms", "whether norms keep only their input", choices=("auto", "yes", "no"), default="auto")
    flag("head-groups", "groups of key/value heads that attention computes one by one", type=int, default=None)
    flag("gpu-memory", "GiB of each GPU to plan with (default: what is free)", type=float, default=None)
    flag(
        "host-memory", "GiB of the machine's memory to plan with (default: most that is free)", type=float, default=None
    )
    flag(
        "loss",
        "cross-entropy through full logits, or tile by tile of the head without ever holding them; auto tiles where "
        "they would take more than a gigabyte",
        choices=LOSSES,
        default="auto",
    )


def _adapters(flag: Flag) -> None:
    flag(
        "lora-r",
        "rank of the LoRA adapters that are trained in place of the weights; 0 trains those",
        type=int,
        default=0,
    )
    flag("lora-alpha", "scales the adapters by alpha / r (default: r, which adds them as they are)", type=float)
    flag("lora-dropout", "of what goes into the adapters", type=float, default=0.0)
    flag(
        "lora-targets",
        "names of the adapted layers (default: all linear ones of the decoder)",
        nargs="+",
        metavar="NAME",
    )
    flag(
        "lora-train",
        "also train these whole, as long contexts want it (LongLoRA, arXiv 2309.12307); default: neither",
        nargs="+",
        choices=LORA_TRAIN,
        default=[],
    )
    flag("quantize", "hold the frozen weights in 4 bits (QLoRA, arXiv 2305.14314), with --lora-r", choices=QUANTIZE)
    flag(
        "double-quant",
        "quantise the scales of the 4-bit weights as well",
        action=argparse.BooleanOptionalAction,
        default=True,
    )
    flag(
        "optimizer",
        "8bit: state in 8 bits; paged: may move to host; muon: for layers' matrices, at 2.5 times the rate",
        choices=OPTIMIZERS,
        default="adamw",
    )


def _saving(flag: Flag) -> None:
    flag(
        "save-every",
        "steps between checkpoints; 0 writes one only when SIGTERM or SIGINT ends the run",
        type=int,
        default=0,
    )
    flag(
        "resume",
        "go on from a checkpoint: the newest of --output-dir, from the start where it has none, or that of a FOLDER",
        nargs="?",
        const="auto",
        metavar="FOLDER",
    )
    flag("keep-checkpoints", "how many of the newest to keep", type=int, default=2)
    flag("sync-save", "training waits for checkpoints; needs no copy of the state in host memory", action="store_true")
    flag("save-dtype", "of the weights in --output-dir (auto: as trained)", choices=SAVE_DTYPES, default="auto")
    flag("max-shard-size", "largest safetensors file of the weights", default="5GB")


def _watching(flag: Flag) -> None:
    flag(
        "max-skipped-steps", "stop after more steps in a row whose loss or gradient is not finite", type=int, default=10
    )
    flag(
        "hang-timeout",
        "end the run when a step makes no headway for so many seconds; 0 never",
        type=float,
        default=1800.0,
    )
    flag(
        "eval-dataset",
        "rows whose perplexity is measured during training, as --dataset; of splits, validation",
        default=None,
    )
    flag("eval-every", "steps between these measurements", type=int, default=0)
    flag("eval-rows", "how many rows of --eval-dataset, from its first", type=int, default=16)
    flag("eval-lengths", "lengths to report (default: --seq-length, its half, … down to a 64th)", type=int, nargs="+")
    flag("sample-every", "steps between answers to --sample-prompts, into samples.jsonl", type=int, default=0)
    flag(
        "sample-prompts",
        "prompts that are answered during training: lines of text, or JSON lines of an example's fields",
        metavar="FILE",
    )
    flag("sample-tokens", "the longest answer", type=int, default=100)
    flag("peak-tflops", "of one GPU in bfloat16, for MFU (default: known for common GPUs)", type=float, default=None)
    flag("profile", "STEP:COUNT writes a torch.profiler trace of COUNT steps from step STEP", default=None)


GROUPS: dict[str, Callable[[Flag], None]] = {
    "run": _run,
    "RoPE": _positions,
    "parallelism": _parallelism,
    "memory": _memory,
    "adapters and quantisation": _adapters,
    "checkpoints and weights": _saving,
    "watching": _watching,
}
