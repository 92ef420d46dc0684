"""Seconds of one layer's attention in a mode, by walking its schedule.

Stage by stage (see `stages.py`), on the slowest rank; a few ranks stand for all of a large ring.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from easyctx.cost.dist_flash_walk import DistFlashWalk
from easyctx.cost.hardware import Cluster
from easyctx.cost.kernels import KernelRates, flops, kernel_rates
from easyctx.cost.ring_walk import RingWalk
from easyctx.cost.stages import EAGER, EXACT, HALF, Message, Passes, Shape, Stage, causal_pairs
from easyctx.modes import Mode, get_mode
from easyctx.schedule import check_heads

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
    passes: Passes = EAGER,
) -> AttentionCost:
    """One direction of one layer in a sequence-parallel mode (or in none, for `data_parallel`).

    Args:
        shape: what one GPU holds. Its tokens are rounded up to what the mode's layout takes.
        ring_degree: for `usp_attn`.

    Raises:
        ValueError: heads, degrees or a kernel that cannot be.
    """
    mode = get_mode(mode) if isinstance(mode, str) else mode
    rates = kernel_rates(cluster.device, kernel) if isinstance(kernel, str) else kernel
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
    inner = inside_ulysses(shape, size // ring)
    walks = [stages_of(mode, inner, ring, rank, backward, rates, passes) for rank in typical_ranks(ring, shape)]
    around = exchange_stages(shape, size // ring, backward, passes)

    def timed(stages: list[Stage]) -> tuple[float, float, float]:
        times = [stage_seconds(stage, inner, cluster, ring, rates, backward) for stage in [*stages, *around]]
        return sum(max(work, wait) for work, _, wait in times), sum(t[0] for t in times), sum(t[1] for t in times)

    seconds, work_seconds, pass_seconds = max(timed(stages) for stages in walks)
    busiest = max(sum(m.bytes_sent for stage in stages for m in stage.messages) for stages in walks)
    busiest += sum(m.bytes_sent for stage in around for m in stage.messages)
    whole = shape.tokens * size
    pairs = causal_pairs(whole, shape.window) * shape.batch / size
    ideal = rates.seconds(
        shape.tokens * shape.batch,
        pairs,
        shape.q_heads,
        shape.head_dim,
        backward=backward,
        windowed=_cuts(shape, whole),
    )
    counted = flops(pairs, shape.q_heads, shape.head_dim, backward=backward)
    return AttentionCost(seconds, work_seconds, pass_seconds, ideal, busiest, counted)


def _cuts(shape: Shape, length: int) -> bool:
    return shape.window is not None and shape.window < length


def typical_ranks(size: int, shape: Shape) -> list[int]:
    """All ranks of a small ring; of a large one a few, which the others resemble: with a window also those near the
    ends, whose two stretches may see each other in a zigzag."""
    if size <= SMALL_RING:
        return list(range(size))
    return [0, size // 2, size - 1] if shape.window is None else [*range(4), size // 2, *range(size - 4, size)]


def inside_ulysses(shape: Shape, degree: int) -> Shape:
    """What the ring inside Ulysses sees: all tokens of `degree` ranks, and a part of the heads."""
    check_heads(shape.q_heads, shape.kv_heads, degree)
    return replace(
        shape,
        tokens=shape.tokens * degree,
        q_heads=shape.q_heads // degree,
        kv_heads=max(shape.kv_heads // degree, 1),
    )


def stages_of(
    mode: Mode, inner: Shape, ring: int, rank: int, backward: bool, rates: KernelRates, passes: Passes
) -> list[Stage]:
    """The stages of one rank of a mode's ring. Raises ValueError for a schedule that nobody has described."""
    schedule = mode.schedule
    name = "ring" if schedule is None else getattr(schedule, "inner", schedule).name
    if name not in WALKS:
        raise ValueError(f"{mode.name} has the schedule {name!r}, whose cost is not described: {', '.join(WALKS)}")
    # With as many key/value heads as query heads flash-attn-4 rounds dk and dv itself; dq it never does.
    unrounded = rates.name == "flash4" and inner.q_heads > inner.kv_heads
    walk = WALKS[name](mode.layout, inner, ring, rank, passes, unrounded=unrounded)
    return walk.backward() if backward else walk.forward()


def exchange_stages(shape: Shape, degree: int, backward: bool, passes: Passes) -> list[Stage]:
    """Ulysses' exchanges (`easyctx.schedule.ulysses`), none of which overlaps anything."""
    if degree == 1:
        return []
    queries = shape.tokens * shape.q_size
    keys = shape.tokens * shape.kv_size * max(degree // shape.kv_heads, 1)
    lse = shape.tokens * shape.batch * shape.q_heads * EXACT
    # Key/value heads that were copied bring their gradients home in float32, to be summed there.
    home = keys * (EXACT if degree > shape.kv_heads else HALF)
    if backward:
        sizes = [(3 * queries + keys) * HALF, lse, queries * HALF, home]
    else:
        sizes = [(queries + keys) * HALF, queries * HALF, lse]
    # Put together, put in order of ranks, and back in order of tokens: three copies of all that is exchanged.
    copied = sum(sizes) / HALF * passes.copy * 3
    return [Stage(pass_bytes=copied), *(Stage(messages=(Message(size / degree, degree),)) for size in sizes)]


def stage_seconds(
    stage: Stage, shape: Shape, cluster: Cluster, ring: int, rates: KernelRates, backward: bool
) -> tuple[float, float, float]:
    """(work with its memory passes, the passes alone, messages) of a stage."""
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
        cluster.all_to_all_seconds(m.degree, m.num_bytes) if m.degree else link.seconds(m.num_bytes)
        for m in stage.messages
    )
    return kernels + passing, passing, wait
