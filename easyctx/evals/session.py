"""Processes, tokenizer and model of an eval run: one process or many, any mode, any engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from easyctx.evals.grid import lengths_of
from easyctx.parser import print_once

if TYPE_CHECKING:
    import torch

    from easyctx.mesh import Mesh

T = TypeVar("T")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_LENGTH = 32768  # of a prompt, where an eval has no --lengths


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a model is run, the same for every eval."""
    from easyctx.adapters.settings import QUANTIZE
    from easyctx.cost.choose import AUTO
    from easyctx.modes import MODES

    run = parser.add_argument_group("how the model runs")
    run.add_argument(
        "--parallel_mode",
        "--parallel-mode",
        choices=[AUTO, *sorted(MODES)],
        default="data_parallel",
        help="mode; auto takes the one that is predicted to be fastest (default: %(default)s)",
    )
    run.add_argument(
        "--sp-degree",
        "--sp_degree",
        type=int,
        help="processes that share one prompt (default: all; 1 in data_parallel)",
    )
    run.add_argument("--ring_degree", "--ring-degree", type=int, help="how many of them form the ring, for usp_attn")
    run.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of weights and activations (auto: bfloat16 on GPUs, else float32)",
    )
    run.add_argument("--rope-theta", "--rope_theta", type=float, help="RoPE base in place of the model's own")
    run.add_argument(
        "--quantize", choices=QUANTIZE, help="hold the model's weights in 4 bits; an adapter's stay as they are"
    )
    run.add_argument("--liger", action="store_true", help="norms, SwiGLU and RoPE by Liger's kernels")
    run.add_argument("--force", action="store_true", help="also run lengths past the model's max_position_embeddings")


@dataclass(frozen=True)
class Session:
    """The processes of a run. `mesh` is data parallel over prompts x sequence parallel inside each."""

    mode: str
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    rope_theta: float | None = None
    quantize: str | None = None
    liger: bool = False
    force: bool = False  # also lengths past the model's
    accelerator: Any = None  # None only where a test brings its own processes

    @property
    def precision(self) -> str:
        """The dtype of weights and activations, how the weights are quantised, and whose kernels run."""
        name = str(self.dtype).removeprefix("torch.")
        name += f", weights in {self.quantize}" if self.quantize else ""
        return f"{name}, Liger's kernels" if self.liger else name

    @property
    def is_main(self) -> bool:
        return self.mesh.dp_rank == 0 and self.mesh.sp_rank == 0

    def say(self, text: str) -> None:
        """Prints on the first rank, beside a progress bar."""
        if self.is_main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on the first rank; its result is every rank's, and so is, as a ValueError, its ValueError or
        OSError."""
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [function(), None]
            except (ValueError, OSError) as error:
                outcome = [None, str(error)]
        if self.mesh.dp_size * self.mesh.sp_size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def gather(self, rows: list[T]) -> list[T]:
        """The rows of all data-parallel ranks, on every rank. Ranks that share a prompt give theirs once."""
        import torch.distributed as dist

        if self.mesh.dp_size == 1:
            return rows
        lists: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lists, rows if self.mesh.sp_rank == 0 else [])
        return [row for each in lists for row in each]

    def share(self, work: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This data-parallel rank's part of the work, as (item, whether it counts).

        All ranks get the same number of items, so that engines whose forwards are collective do not hang;
        items that only fill up do not count.
        """
        size, rank = self.mesh.dp_size, self.mesh.dp_rank
        for begin in range(0, len(work), size):
            turn = work[begin : begin + size]
            yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def start(args: argparse.Namespace) -> Session:
    """Joins the processes. Raises ValueError for a mode or degree that does not fit them."""
    from easyctx.adapters.settings import AdapterSettings, check_adapter_engine, check_quantize_package
    from easyctx.engine import check_launch, launched_processes, make_accelerator
    from easyctx.modes import check_mode, make_mode_mesh

    check_launch()
    if args.rope_theta is not None and not args.rope_theta > 0:
        raise ValueError(f"--rope-theta is {args.rope_theta}, and must be positive")
    check_quantize_package(args.quantize)
    _resolve_auto(args)
    degree = check_mode(args.parallel_mode, args.sp_degree, launched_processes(), args.ring_degree)
    import torch

    accelerator = make_accelerator()
    check_adapter_engine(AdapterSettings(quantize=args.quantize), "adamw", accelerator)
    return Session(
        mode=args.parallel_mode,
        mesh=make_mode_mesh(args.parallel_mode, degree, args.ring_degree),
        device=accelerator.device,
        dtype=getattr(torch, _dtype_name(args.dtype, accelerator)),
        rope_theta=args.rope_theta,
        quantize=args.quantize,
        liger=args.liger,
        force=args.force,
        accelerator=accelerator,
    )


def _resolve_auto(args: argparse.Namespace) -> None:
    """Put the mode in the place of "auto", for the first model and the longest prompts."""
    from easyctx.adapters.folder import config_source
    from easyctx.cost.choose import AUTO, resolve_mode
    from easyctx.engine import launched_processes

    if args.parallel_mode != AUTO:
        return
    model = config_source(args.model[0] if getattr(args, "model", None) else args.judge)
    longest = lengths_of(args)[-1] if hasattr(args, "lengths") else DEFAULT_LENGTH
    args.parallel_mode, args.ring_degree = resolve_mode(
        model, longest, launched_processes(), args.sp_degree, args.ring_degree, forward_only=True
    )


def _dtype_name(asked: str, accelerator: Any) -> str:
    """DeepSpeed and FSDP compute in their mixed precision, whatever the weights were loaded as."""
    engine = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
    if shards_weights(accelerator) and engine is not None:
        if asked not in ("auto", engine):
            raise ValueError(
                f"--dtype is {asked}, but the accelerate configuration's mixed_precision is "
                f"{accelerator.mixed_precision}: make them the same, or leave --dtype out"
            )
        return engine
    if asked == "auto":
        return "bfloat16" if accelerator.device.type == "cuda" else "float32"
    return asked


def shards_weights(accelerator: Any) -> bool:
    from accelerate import DistributedType

    return accelerator is not None and accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    )


def run_main(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Runs an eval; a user's mistake is one line and exit status 2."""
    try:
        run(args)
    except ValueError as error:
        print_once(str(error))
        return 2
    finally:
        if "easyctx.mesh" in sys.modules:  # nothing was started before it was needed
            sys.modules["easyctx.mesh"].leave_processes()
    return 0
