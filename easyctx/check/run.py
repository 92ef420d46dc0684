"""One check from settings to result."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tqdm import tqdm

from easyctx.capability import check_config
from easyctx.check.compare import Comparison, compare, compare_half
from easyctx.check.launch import prepare_ranks, run_ranks
from easyctx.check.model import make_model
from easyctx.check.probe import Layer, probe, stock_attention
from easyctx.check.settings import MAX_CPU_RANKS, CheckSettings, check_length, check_settings
from easyctx.check.shrink import Small, shrink
from easyctx.check.source import load_config
from easyctx.check.steps import Plan, Trace, count_kernel_calls, one_process, one_rank
from easyctx.kernel import Workload, get_kernel
from easyctx.modes import get_mode


@dataclass
class Subject:
    """What is checked: the original configuration, the small one, its attention, and where it runs."""

    settings: CheckSettings
    config: Any
    origin: str
    small: Small
    layers: list[Layer]
    attention: str
    device_type: str

    @property
    def plan(self) -> Plan:
        return Plan(self.settings, self.small.config, self.small.seq_length, self.attention, self.device_type)


@dataclass
class Result:
    """A subject, how it compared, and which kernels its ranks called how often."""

    subject: Subject
    comparison: Comparison
    kernels: dict[str, dict[str, int]]
    seconds: float

    @property
    def holds(self) -> bool:
        return self.comparison.holds


def prepare(settings: CheckSettings) -> Subject:
    """Everything that can be refused before a process is spawned.

    Raises:
        ValueError: what a user can mend, or what easyctx does not compute, naming both values and the way out.
    """
    check_settings(settings)
    config, origin = load_config(settings.model)
    mode = get_mode(settings.parallel_mode)
    check_config(config, mode, settings.sp, settings.ring_degree)
    small, layers, attention = _make_small(config, settings)
    device_type = choose_device(settings, layers)
    if mode.is_sequence_parallel:
        _check_kernels(settings, layers, device_type)
    return Subject(settings, config, origin, small, layers, attention, device_type)


def check(subject: Subject, setup: Callable[[], None] | None = None) -> Result:
    """Train the subject in one process and on SP x DP ranks, and compare.

    Args:
        setup: a module-level function that every rank calls first.

    Raises:
        RankError: a rank died, failed or fell silent.
        ValueError: easyctx refused on a rank what only a call can show.
    """
    start, settings, plan = time.monotonic(), subject.settings, subject.plan
    model_module = type(subject.config).__module__.replace(".configuration_", ".modeling_")
    context = prepare_ranks(model_module, subject.device_type)
    device = torch.device(subject.device_type)
    dtype, micro_batches = settings.torch_dtype, settings.steps * settings.accumulate

    exact: Trace | None = None
    if settings.is_half:
        with _phase("one process, float64", micro_batches * settings.dp) as progress:
            exact = one_process(plan, torch.float64, device, progress)
    with _phase(f"one process, {settings.dtype}", micro_batches * settings.dp) as progress:
        alone = one_process(plan, dtype, device, progress)
    with _phase(f"SP {settings.sp} x DP {settings.dp}, {settings.dtype}", micro_batches) as progress:
        ranks = run_ranks(
            context,
            rank_job,
            plan,
            world_size=settings.world_size,
            device_type=subject.device_type,
            timeout=settings.timeout,
            on_progress=progress,
            setup=setup,
        )
    sharded = Trace(ranks[0]["losses"], ranks[0]["gradients"])
    if exact is None:
        comparison = compare(sharded, alone, settings.limit)
    else:
        comparison = compare_half(sharded, alone, exact, settings.limit, torch.finfo(dtype).eps)
    return Result(subject, comparison, _sum_calls([r["kernels"] for r in ranks]), time.monotonic() - start)


def rank_job(plan: Plan, rank: int, device: torch.device, progress: Callable[[], None]) -> dict[str, Any]:
    """What each rank does: its steps, and a count of the kernels that it called."""
    kernels = count_kernel_calls()
    trace = one_rank(plan, rank, device, progress)
    found: dict[str, Any] = {"kernels": kernels}
    if rank == 0:  # the ranks' sums are the same
        found |= {"losses": trace.losses, "gradients": trace.gradients}
    return found


def choose_device(settings: CheckSettings, layers: list[Layer]) -> str:
    """ "cuda" or "cpu": GPUs where there is one a rank and a kernel for the dtype, unless the settings say."""
    ranks, gpus = settings.world_size, torch.cuda.device_count()
    if settings.device == "cuda" and gpus < ranks:
        raise ValueError(
            f"--device cuda needs a GPU a rank, {ranks} for --sp {settings.sp} --dp {settings.dp}, and {gpus} were "
            "found: lower them, or --device cpu"
        )
    device_type = settings.device
    if device_type == "auto":
        device_type = "cuda" if gpus >= ranks and _have_kernels(settings, layers) else "cpu"
    if device_type == "cpu" and ranks > MAX_CPU_RANKS:
        raise ValueError(
            f"--sp {settings.sp} x --dp {settings.dp} are {ranks} processes on this machine's CPU, and the check "
            f"starts at most {MAX_CPU_RANKS}: lower them"
        )
    return device_type


def _make_small(config: Any, settings: CheckSettings) -> tuple[Small, list[Layer], str]:
    """The small configuration, its layers as probed, and the one process's attention."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for keep_hidden in (False, True):
        small = shrink(
            config,
            num_layers=settings.layers,
            seq_length=settings.seq_length,
            sp=settings.sp,
            packed=settings.packed,
            all_experts=settings.is_half,
            keep_hidden=keep_hidden,
        )
        check_length(small.seq_length, settings.sp)
        try:
            model = make_model(small.config, dtype=torch.float32, seed=settings.seed, device="cpu")
        except ValueError:  # some families take their head dim from the width, and say so
            if keep_hidden:
                raise
            continue
        layers = probe(model)
        if all(layer.head_dim == head_dim and layer.q_heads == heads for layer in layers):
            return small, layers, stock_attention(model, layers)
    raise ValueError(
        f"a small {config.model_type} has {layers[0].q_heads} heads x {layers[0].head_dim}, not the {heads} x "
        f"{head_dim} of its configuration: this family cannot be made small"
    )


def _have_kernels(settings: CheckSettings, layers: list[Layer]) -> bool:
    if not get_mode(settings.parallel_mode).is_sequence_parallel:
        return True
    return not any(_kernel_refusal(settings, layer, "cuda") for layer in layers)


def _check_kernels(settings: CheckSettings, layers: list[Layer], device_type: str) -> None:
    for layer in layers:
        if refusal := _kernel_refusal(settings, layer, device_type):
            ways = "another --attn-kernel or another --dtype"
            if device_type == "cuda":
                ways = "--dtype bfloat16, --attn-kernel reference (exact and slow), or --device cpu"
            raise ValueError(f"{refusal} (--dtype {settings.dtype} on {device_type}): try {ways}")


def _kernel_refusal(settings: CheckSettings, layer: Layer, device_type: str) -> str | None:
    work = Workload(
        torch.device(device_type),
        settings.torch_dtype,
        layer.head_dim,
        windowed=layer.window is not None,
        softcapped=layer.softcap is not None,
        packed=settings.packed,
    )
    try:
        get_kernel(settings.attn_kernel, work)
    except ValueError as error:
        return str(error)
    return None


def _sum_calls(ranks: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for calls in ranks:
        for name, counts in calls.items():
            summed = total.setdefault(name, {})
            for which, count in counts.items():
                summed[which] = summed.get(which, 0) + count
    return total


@contextmanager
def _phase(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A line a phase, with a bar over its micro-batches where a terminal shows it."""
    start = time.monotonic()
    if not sys.stderr.isatty():
        print(f"easyctx check: {name} ...", file=sys.stderr, flush=True)
    with tqdm(total=total, desc=name, unit="micro-batch", disable=None, leave=False) as bar:

        def progress() -> None:
            bar.update()

        yield progress
    print(f"easyctx check: {name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No word from transformers or the kernels' chooser: the report says it all."""
    logger = logging.getLogger("easyctx")
    level, verbosity = logger.level, transformers.logging.get_verbosity()
    logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
