"""Deciding, for the length at hand, what is kept where: the least work that fits into GPU and host memory.

Pure like the budget. All ways to compute a layer (tiles, head groups) and all distances between kept inputs are tried;
for each, memory is filled with what saves the most work: inputs first, since without them nothing goes, attention's
results next, then whole layers' activations. Of what fits, the one with the least to compute again is taken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from easyctx.memory.budget import GIB, Breakdown, Choices, LayerChoice, MemoryShape, Place, Setting, predict, states
from easyctx.memory.engines import get_engine
from easyctx.memory.pinned import rounded_away
from easyctx.memory.work import least_work, work_again

MLP_TILE = 8_192  # tokens: wide enough for a GPU's matrices


@dataclass(frozen=True)
class Wishes:
    """Choices that are forced; None where the policy decides.

    inputs, attention: "gpu", "host", and for attention "recompute", "kept" (anywhere).
    everything: True for no checkpoints at all, False for a checkpoint in each layer.
    every: layers to a kept input.
    """

    inputs: str | None = None
    attention: str | None = None
    everything: bool | None = None
    every: int | None = None
    mlp_tile: int | None = None
    tiled_norms: bool | None = None
    head_groups: int | None = None

    @property
    def are_none(self) -> bool:
        return self == Wishes()


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used: of each GPU, of a machine's host memory."""

    gpu: int
    host: int


# What a step is taken to lose as PyTorch, the GPU being full, gives back what it had cached. A guess: steps that did so
# twice took 0.6 and 0.9 s longer than predicted (benchmarks/results/train_step_2xNVIDIA-H200_20261124.json).
GIVING_BACK = 0.5  # seconds

BESIDE_PYTORCH = GIB  # of a GPU: NCCL's buffers
FRAGMENTS = 0.03


def usable_gpu_memory(free: int) -> int:
    """Bytes of `free` ones that PyTorch can be expected to use."""
    return int(free * (1 - FRAGMENTS)) - BESIDE_PYTORCH


@dataclass(frozen=True)
class Decision:
    """What is kept where, and what that takes.

    pins: whether offloaded weights and gradients are pinned, where the engine would.
    left_free: bytes of the GPU's budget that nothing was decided on, for gradients in memory of their own.
    """

    choices: Choices
    predicted: Breakdown
    pins: bool = True
    left_free: int = 0


class DoesNotFit(ValueError):
    """No choice fits; `best` is the one that comes closest."""

    def __init__(self, best: Decision) -> None:
        super().__init__("no choice fits")
        self.best = best


def decide(shape: MemoryShape, setting: Setting, budget: Budget, wishes: Wishes, length: int) -> Decision:
    """The choices with the least to compute again among those that fit.

    Pinned memory is faster, but rounded up: weights and gradients are offloaded without where only that fits.

    Args:
        length: of the whole sequence, in tokens, which attention's work grows with.

    Raises:
        DoesNotFit: if there are none.
    """
    try:
        return _with_room_for_gradients(
            _decide(shape, setting, budget, wishes, length), shape, setting, budget, wishes, length
        )
    except DoesNotFit:
        if not rounded_away(shape, setting):
            raise
    return replace(_decide(shape, replace(setting, pins=False), budget, wishes, length), pins=False)


def _with_room_for_gradients(
    found: Decision, shape: MemoryShape, setting: Setting, budget: Budget, wishes: Wishes, length: int
) -> Decision:
    """Less kept than `found` where the engine's gradients lie in memory of their own and both do not fit.

    Unless making the difference again takes longer than it does PyTorch to give back what it holds, in every step.
    Where micro-batches accumulate, the prediction has all gradients at every moment: they are no second time beside it.
    """
    gradients = states(shape, setting)[1]
    has_room = setting.accumulates or found.predicted.gpu_peak + gradients <= budget.gpu
    if not get_engine(setting.engine).own_pool or has_room:
        return found
    try:
        frugal = _decide(shape, setting, replace(budget, gpu=budget.gpu - gradients), wishes, length)
    except DoesNotFit:
        return found
    more = setting.tokens * (work_again(frugal.choices, shape, length) - work_again(found.choices, shape, length))
    return found if more > GIVING_BACK else replace(frugal, left_free=gradients)


def _decide(shape: MemoryShape, setting: Setting, budget: Budget, wishes: Wishes, length: int) -> Decision:
    fitting: list[tuple[float, int, Choices]] = []
    closest: list[Decision] = []
    for start in _ways(shape, setting, wishes):
        if fitting and least_work(start, shape, length) >= min(work for work, *_ in fitting):
            continue
        found = _fill(start, shape, setting, budget, wishes)
        if found is not None:
            fitting.append((work_again(found, shape, length), len(fitting), found))
        elif not fitting:
            for place in ("host", "gpu"):
                smallest = _smallest(start, shape, wishes, place)
                closest.append(Decision(smallest, predict(shape, setting, smallest)))
    if not fitting:
        raise DoesNotFit(min(closest, key=lambda d: _excess(d.predicted, budget)))
    choices = min(fitting, key=lambda found: found[:2])[2]
    return Decision(choices, predict(shape, setting, choices))


def longest_that_fits(shape: MemoryShape, setting: Setting, budget: Budget, wishes: Wishes, step: int = 1024) -> int:
    """The most tokens to a rank, in steps of `step`, for which some choice fits; 0 if none does."""

    setting = replace(setting, pins=False)
    frugal = list(_ways(shape, setting, wishes))
    most = max((way.mlp_tile, way.tiled_norms, way.head_groups) for way, _ in frugal)
    frugal = [(way, k) for way, k in frugal if (way.mlp_tile, way.tiled_norms, way.head_groups) == most]

    def fits(tokens: int) -> bool:
        given = replace(setting, tokens=tokens)
        return any(_fill(way, shape, given, budget, wishes, only_inputs=True) is not None for way in frugal)

    low, high = 0, 1
    while high < 1 << 20 and fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _ways(shape: MemoryShape, setting: Setting, wishes: Wishes) -> Iterator[tuple[Choices, int]]:
    """Every way to compute a layer, with every distance between kept inputs, those that cost least first."""
    tiles = [0] if shape.is_mixture else [0, MLP_TILE]
    tiles = tiles if wishes.mlp_tile is None else [wishes.mlp_tile]
    norms = [False, True] if wishes.tiled_norms is None else [wishes.tiled_norms]
    groups = [
        g
        for g in (1, 2, 4, 8, 16)
        if shape.kv_heads % g == 0 and (g == 1 or shape.kv_heads // g % setting.ulysses == 0)
    ]
    groups = groups if wishes.head_groups is None else [wishes.head_groups]
    distances = (
        [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k <= shape.num_layers] if wishes.every is None else [wishes.every]
    )
    for every in distances:
        for tile in tiles:
            for norm in norms:
                for group in groups:
                    yield Choices((), tile, norm, group), every


def _fill(
    way: tuple[Choices, int],
    shape: MemoryShape,
    setting: Setting,
    budget: Budget,
    wishes: Wishes,
    only_inputs: bool = False,
) -> Choices | None:
    """The most that can be kept this way, or whatever must be with `only_inputs`; None if not even that can."""
    rest, every = way
    if wishes.everything:
        unchecked = replace(rest, layers=(LayerChoice(everything=True),) * shape.num_layers)
        return unchecked if every == 1 and _fits(predict(shape, setting, unchecked), budget) else None
    inputs = -(-shape.num_layers // every)
    items = inputs + (0 if wishes.attention == "recompute" else shape.num_layers)
    fewest = items if wishes.attention in ("kept", "gpu", "host") else inputs

    def with_kept(on_gpu: int, on_host: int, whole: int = 0) -> Choices:
        return replace(rest, layers=_layers(shape.num_layers, every, on_gpu, on_host, whole, wishes))

    def fits(on_gpu: int, on_host: int, whole: int = 0) -> bool:
        return _fits(predict(shape, setting, with_kept(on_gpu, on_host, whole)), budget)

    # What goes to the host comes back through buffers on the GPU, so that as much as possible on the GPU is not
    # always the most in all.
    best: tuple[int, int] | None = None
    most_on_gpu = _most(0, items, lambda g: fits(g, max(fewest - g, 0)))
    if most_on_gpu is not None and only_inputs:
        return with_kept(most_on_gpu, max(fewest - most_on_gpu, 0))
    for on_gpu in () if most_on_gpu is None else _downwards(most_on_gpu):
        on_host = _most(max(fewest - on_gpu, 0), items - on_gpu, lambda h, g=on_gpu: fits(g, h))  # type: ignore[misc]
        if on_host is not None and (best is None or on_gpu + on_host > sum(best)):
            best = on_gpu, on_host
        if on_gpu + (on_host or 0) == items:
            break
    if best is None:
        return None
    whole = 0
    may_be_whole = every == 1 and best[0] == items and wishes.everything is None
    if may_be_whole and not wishes.inputs and not wishes.attention:
        whole = _most(0, shape.num_layers, lambda w: fits(items, 0, w)) or 0
    return with_kept(*best, whole)


def _smallest(way: tuple[Choices, int], shape: MemoryShape, wishes: Wishes, place: str) -> Choices:
    """The least that is kept this way, all of it on the host (least of the GPU) or on the GPU (least of the host)."""
    rest, every = way
    if wishes.everything:
        return replace(rest, layers=(LayerChoice(everything=True),) * shape.num_layers)
    kept = -(-shape.num_layers // every)
    on_gpu, on_host = (kept, 0) if place == "gpu" else (0, kept)
    return replace(rest, layers=_layers(shape.num_layers, every, on_gpu, on_host, 0, wishes))


def _layers(count: int, every: int, on_gpu: int, on_host: int, whole: int, wishes: Wishes) -> tuple[LayerChoice, ...]:
    """Places for inputs, then for attention, from the last layer to the first: the last are needed first.

    The first `on_gpu` of these items stay on the GPU, the next `on_host` go to the host, the rest is made again.
    """
    places: dict[tuple[str, int], Place] = {}
    kept_inputs = [index for index in reversed(range(count)) if index % every == 0]
    items = [("inputs", index) for index in kept_inputs] + [("attention", index) for index in reversed(range(count))]
    for number, item in enumerate(items):
        places[item] = "gpu" if number < on_gpu else "host" if number < on_gpu + on_host else "recompute"
        wished = wishes.inputs if item[0] == "inputs" else wishes.attention
        if wished in ("gpu", "host", "recompute"):
            places[item] = wished  # type: ignore[assignment]
    return tuple(
        LayerChoice(places.get(("inputs", index), "recompute"), places[("attention", index)], index >= count - whole)
        for index in range(count)
    )


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from low to high that fits, if low does; what fits is taken to be one stretch."""
    if not fits(low):
        # With little on the GPU the host may be too full, and the other way round.
        low = next((n for n in range(low + 1, high + 1, max(1, (high - low) // 8)) if fits(n)), -1)
        if low < 0:
            return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _downwards(number: int) -> Iterator[int]:
    """From a number to 0, in growing steps."""
    step = 0
    while number > step:
        yield number - step
        step = 2 * step or 1
    yield 0


def _fits(predicted: Breakdown, budget: Budget) -> bool:
    return predicted.gpu_peak <= budget.gpu and predicted.host_peak <= budget.host


def _excess(predicted: Breakdown, budget: Budget) -> float:
    return max(predicted.gpu_peak - budget.gpu, 0) / GIB + max(predicted.host_peak - budget.host, 0) / GIB
