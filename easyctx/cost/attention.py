"""Seconds of one layer's attention in a mode, by walking its schedule.

Stage by stage (see `stages.py`), on the slowest rank; a few ranks stand for all of a large ring.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from easyctx.cost.dist_flash_walk import DistFlashWalk
from easyctx.cost.hardware import Cluster, Device
from easyctx.cost.kernels import KernelRates, flops, kernel_rates
from easyctx.cost.ring_walk import RingWalk
from easyctx.cost.stages import INSIDE, OUTSIDE, Passes, Shape, Stage, causal_pairs
from easyctx.cost.ulysses_walk import UlyssesWalk
from easyctx.modes import Mode, get_mode

WALKS: dict[str, Callable[..., RingWalk | DistFlashWalk]] = {"ring": RingWalk, "dist_flash": DistFlashWalk}
SMALL_RING = 8


@dataclass(frozen=True)
class AttentionCost:
    """One layer, one direction, on each of the GPUs that share a sequence.

    seconds: of the slowest rank. work_seconds: of its kernels and memory passes (pass_seconds the latter alone).
    exposed_seconds: the rest, spent waiting for messages. ideal_seconds: the kernel's alone, were the work even and
    in one block. bytes_sent: of the busiest rank. flops: of a GPU on average, causal pairs counted once.
    """

    seconds: float
    work_seconds: float
    pass_seconds: float
    ideal_seconds: float
    bytes_sent: float
    flops: float

    @property
    def exposed_seconds(self) -> float:
        return self.seconds - self.work_seconds

    @property
    def share(self) -> float:
        """Of the local kernel's own rate."""
        return self.ideal_seconds / self.seconds

    @property
    def tflops_per_gpu(self) -> float:
        return self.flops / self.seconds / 1e12

    def __add__(self, other: "AttentionCost") -> "AttentionCost":
        return AttentionCost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, layers: float) -> "AttentionCost":
        return AttentionCost(*(layers * value for value in _values(self)))


def _values(cost: AttentionCost) -> tuple[float, ...]:
    seconds = (cost.seconds, cost.work_seconds, cost.pass_seconds, cost.ideal_seconds)
    return (*seconds, cost.bytes_sent, cost.flops)


def attention_cost(
    mode: str | Mode,
    shape: Shape,
    cluster: Cluster,
    *,
    backward: bool = False,
    ring_degree: int | None = None,
    kernel: str | KernelRates = "auto",
    passes: Passes | None = None,
) -> AttentionCost:
    """One direction of one layer in a sequence-parallel mode (or in none, for `data_parallel`).

    Args:
        shape: what one GPU holds. Its tokens are rounded up to what the mode's layout takes.
        ring_degree: for `usp_attn`.
        passes: of memory; None for those that the code makes with this kernel.

    Raises:
        ValueError: heads, degrees or a kernel that cannot be.
    """
    mode = get_mode(mode) if isinstance(mode, str) else mode
    rates = kernel_rates(cluster.device, kernel) if isinstance(kernel, str) else kernel
    passes = passes or passes_of(cluster.device, rates.name)
    return _cost(mode, shape, cluster, backward, ring_degree, rates, passes)


@lru_cache(maxsize=4096)
def _cost(
    mode: Mode,
    shape: Shape,
    cluster: Cluster,
    backward: bool,
    ring_degree: int | None,
    rates: KernelRates,
    passes: Passes,
) -> AttentionCost:
    size = cluster.gpus if mode.schedule is not None else 1
    ring = size if mode.schedule is None else mode.check_ring_degree(ring_degree, size)
    layout = mode.shard_layout(size, ring_degree) if mode.schedule is not None else mode.layout
    shape = replace(shape, tokens=-(-shape.tokens * size // layout.multiple(size)) * layout.multiple(size) // size)
    exchange = UlyssesWalk(shape, size // ring, passes, backward=backward)
    walks = [stages_of(mode, exchange.inner, ring, rank, backward, passes) for rank in typical_ranks(ring, shape)]

    def timed(stage: Stage) -> Times:
        return stage_times(stage, exchange.inner, cluster, ring, rates, backward)

    group = max((sum((timed(stage) for stage in stages), Times()) for stages in walks), key=lambda times: times.seconds)
    total = timed(exchange.first()) + timed(exchange.last())
    for number in range(exchange.groups):
        meanwhile = timed(exchange.meanwhile(number))
        work = group.work + meanwhile.work
        total = total + Times(
            max(group.seconds + meanwhile.work, meanwhile.wait), work, group.passes + meanwhile.passes
        )

    busiest = exchange.groups * max(sum(m.bytes_sent for stage in stages for m in stage.messages) for stages in walks)
    outer = [exchange.first(), *(exchange.meanwhile(n) for n in range(exchange.groups)), exchange.last()]
    busiest += sum(m.bytes_sent for stage in outer for m in stage.messages)
    whole = shape.tokens * size
    pairs = causal_pairs(whole, shape.window) * shape.batch / size
    windowed = shape.window is not None and shape.window < whole
    rows = shape.tokens * shape.batch
    ideal = rates.seconds(rows, pairs, shape.q_heads, shape.head_dim, backward=backward, windowed=windowed)
    counted = flops(pairs, shape.q_heads, shape.head_dim, backward=backward)
    return AttentionCost(total.seconds, total.work, total.passes, ideal, busiest, counted)


@dataclass(frozen=True)
class Times:
    """Seconds: from start to end; of kernels and memory passes; of the latter alone; of messages."""

    seconds: float = 0.0
    work: float = 0.0
    passes: float = 0.0
    wait: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        return Times(
            self.seconds + other.seconds, self.work + other.work, self.passes + other.passes, self.wait + other.wait
        )


def typical_ranks(size: int, shape: Shape) -> list[int]:
    """All ranks of a small ring; of a large one a few, which the others resemble: with a window also those near the
    ends, whose two stretches may see each other in a zigzag."""
    if size <= SMALL_RING:
        return list(range(size))
    return [0, size // 2, size - 1] if shape.window is None else [*range(4), size // 2, *range(size - 4, size)]


def stages_of(mode: Mode, inner: Shape, ring: int, rank: int, backward: bool, passes: Passes) -> list[Stage]:
    """The stages of one rank of a mode's ring. Raises ValueError for a schedule that nobody has described."""
    if not is_described(mode):
        raise ValueError(f"{mode.name} runs {_walk_name(mode)!r}, whose cost is not described: {', '.join(WALKS)}")
    walk = WALKS[_walk_name(mode)](mode.layout, inner, ring, rank, passes)
    return walk.backward() if backward else walk.forward()


def is_described(mode: Mode) -> bool:
    """Whether the cost of a mode is known: that of a new schedule is a new class beside `RingWalk`."""
    return _walk_name(mode) in WALKS


def _walk_name(mode: Mode) -> str:
    """The schedule that runs inside Ulysses, or the mode's only one; one rank alone is a ring of one."""
    return "ring" if mode.schedule is None else getattr(mode.schedule, "inner", mode.schedule).name


def passes_of(device: Device, kernel: str) -> Passes:
    """Where a kernel's outputs are merged and its gradients summed (`easyctx.kernel.flash4`)."""
    return INSIDE if kernel == "flash4" and device.family == "hopper" else OUTSIDE


def stage_times(stage: Stage, shape: Shape, cluster: Cluster, ring: int, rates: KernelRates, backward: bool) -> Times:
    """Of a stage: the longer of its work and its messages."""
    kernels = sum(
        rates.seconds(
            work.rows * shape.batch,
            work.pairs * shape.batch,
            shape.q_heads,
            shape.head_dim,
            backward=backward,
            windowed=work.windowed,
        )
        for work in stage.work
    )
    passing = stage.pass_bytes / cluster.device.streaming_rate
    link = cluster.ring_link(ring)
    wait = sum(
        cluster.all_to_all_seconds(m.degree, m.num_bytes) if m.degree else link.seconds(max(m.num_bytes, m.received))
        for m in stage.messages
    )
    return Times(max(kernels + passing, wait), kernels + passing, passing, wait)
