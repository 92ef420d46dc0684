"""A memory decision in words: before the first step, on refusal, and when memory runs out all the same."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from easyctx.memory.budget import GIB, Choices, LayerChoice
from easyctx.memory.policy import Budget, Decision

UNLIMITED = 1 << 60  # a GPU budget where there is no GPU

OWN_POOL = "FSDP2 makes on a stream of their own, whose memory PyTorch gives to nothing else"
NOT_PINNED = "offloaded weights and gradients are not pinned: rounded up as pinned memory is, they would not fit"

_WHERE = {"gpu": "on the GPU", "host": "on the host"}


def describe(decision: Decision, budget: Budget) -> list[str]:
    """What was decided, and the predicted peaks beside what there is."""
    predicted = decision.predicted
    lines = [
        f"memory: kept {describe_choices(decision.choices)}",
        f"memory: predicted peak {gib(predicted.gpu_peak)} {_of(budget)}"
        f"({predicted.moment}: {_terms(predicted.gpu)}); {gib(predicted.host_peak)} of {gib(budget.host)} GiB of the "
        f"machine's host memory ({_terms(predicted.host)})",
    ]
    return lines + [f"memory: {remark}" for remark in remarks(decision)]


def remarks(decision: Decision) -> list[str]:
    """What else is to be known of a decision."""
    found = [f"{gib(decision.left_free)} GiB of the GPU are left to gradients, which {OWN_POOL}"] * bool(
        decision.left_free
    )
    return found + [NOT_PINNED] * (not decision.pins)


def _of(budget: Budget) -> str:
    return "GiB a rank " if budget.gpu >= UNLIMITED else f"of {gib(budget.gpu)} usable GiB a GPU "


def describe_choices(choices: Choices) -> str:
    """ "12 layers keep all; 20 layers keep input and attention on the GPU; MLP whole; …"."""
    parts = [f"{n} x {_kept(layer)}" for layer, n in Counter(choices.layers).items()]
    parts = [f"of {len(choices.layers)} layers " + ", ".join(parts)]
    parts.append(f"MLP in tiles of {choices.mlp_tile:,} tokens" if choices.mlp_tile else "MLP whole")
    if choices.tiled_norms:
        parts.append("norms tiled")
    if choices.head_groups > 1:
        parts.append(f"attention in {choices.head_groups} groups of heads")
    return "; ".join(parts)


def _kept(layer: LayerChoice) -> str:
    if layer.everything:
        return "everything"
    if layer.inputs == layer.attention != "recompute":
        return f"input and attention's result {_WHERE[layer.inputs]}"
    kept = [
        f"{what} {_WHERE[place]}"
        for what, place in (("input", layer.inputs), ("attention's result", layer.attention))
        if place != "recompute"
    ]
    return " and ".join(kept) or "nothing"


def why_not(best: Decision, budget: Budget, tokens: int, longest: int, length: int, sp_size: int) -> str:
    """Why no choice fits, with the nearest length that does."""
    predicted = best.predicted
    short = [
        f"{gib(need)} GiB of {where} are needed and {gib(there)} are there"
        for where, need, there in (
            ("GPU memory", predicted.gpu_peak, budget.gpu),
            ("host memory", predicted.host_peak, budget.host),
        )
        if need > there
    ]
    way_out = (
        f"the longest that fits is about --seq-length {longest}" if longest else "no length does: more GPUs, or offload"
    )
    return (
        f"--seq-length {length} ({tokens:,} tokens a rank, {sp_size} rank{'s' if sp_size > 1 else ''} to a sequence) "
        f"does not fit, however it is kept: {' and '.join(short)} ({predicted.moment}: {_terms(predicted.gpu)}; "
        f"{describe_choices(best.choices)}); {way_out}"
    )


class OutOfMemory(RuntimeError):
    """Memory ran out during a step, although the prediction said that it would do."""


@contextmanager
def explained(decision: Decision | None, budget: Budget | None) -> Iterator[None]:
    """Out of memory inside it says what was predicted, what was used, and which flag to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        if decision is None or budget is None:
            raise
        raise OutOfMemory(f"{error}\n{explain(decision, budget, isinstance(error, MemoryError))}") from error


def explain(decision: Decision, budget: Budget, is_host: bool) -> str:
    """What to do about it."""
    predicted = decision.predicted
    used = "" if not torch.cuda.is_available() else _used()
    where, flag, there = ("host", "--host-memory", budget.host) if is_host else ("GPU", "--gpu-memory", budget.gpu)
    return (
        f"easyctx: out of {where} memory. Predicted were {gib(predicted.gpu_peak)} GiB a GPU ({predicted.moment}: "
        f"{_terms(predicted.gpu)}) and {gib(predicted.host_peak)} GiB on the host{used}. "
        f"{describe_choices(decision.choices)}. Give {flag} {0.9 * there / GIB:.0f} to have less kept"
        f"{_next_steps(decision.choices)}, or a shorter --seq-length"
    )


def _used() -> str:
    free, total = torch.cuda.mem_get_info()
    return (
        f"; PyTorch had {gib(torch.cuda.max_memory_allocated())} GiB at most, {gib(torch.cuda.memory_reserved())} "
        f"reserved now, and {gib(free)} of the GPU's {gib(total)} are free"
    )


def _next_steps(choices: Choices) -> str:
    """Flags that lower the peak further and are not used yet."""
    flags = [] if choices.mlp_tile else ["--mlp-tile 8192"]
    flags += [] if choices.tiled_norms else ["--tiled-norms yes"]
    if any(layer.everything for layer in choices.layers):
        flags.append("--recompute keep-attention")
    if any(layer.attention == "gpu" for layer in choices.layers):
        flags.append("--keep-attention host")
    if any(layer.inputs == "gpu" for layer in choices.layers):
        flags.append("--keep-inputs host")
    return f", or turn {', '.join(flags)}" if flags else ""


def _terms(terms: dict[str, int]) -> str:
    """The terms that matter, largest first."""
    total = sum(terms.values())
    large = sorted(((size, name) for name, size in terms.items() if size > total / 100), reverse=True)
    return ", ".join(f"{name} {gib(size)}" for size, name in large)


def gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / GIB:.3f}"
