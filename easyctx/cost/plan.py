"""What `easyctx plan` works out: the longest sequence, the memory of a step and its time, for a model and a machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from easyctx.cost.choose import AUTO, Candidate, best, candidates
from easyctx.cost.hardware import GIB, Cluster, Device
from easyctx.cost.kernels import kernel_rates
from easyctx.cost.stages import Shape
from easyctx.cost.step import Step, StepCost, step_cost
from easyctx.kernel.flash4 import HOPPER_HEAD_DIMS
from easyctx.memory.budget import ENGINES, Choices, MemoryShape, Setting, Widths
from easyctx.memory.policy import (
    BESIDE_PYTORCH,
    MLP_TILE,
    Budget,
    Decision,
    DoesNotFit,
    Wishes,
    decide,
    longest_that_fits,
    usable_gpu_memory,
)
from easyctx.memory.working_set import BY_BLOCKS
from easyctx.mesh import divisors
from easyctx.modes import MODES, check_mode, get_mode
from easyctx.training.objective import SMALL_LOGITS

STEP_OF_LENGTH = 1024  # tokens a GPU
PROBE = 65536  # tokens a GPU at which a mode is chosen before the longest sequence is known
MOST_GPUS = 16384  # every rank's part of attention is looked at, which for these takes minutes
PLAN_ENGINES = tuple(name for name in ENGINES if name != "one process")


@dataclass(frozen=True)
class Request:
    """What is asked: a model on a machine. gpus: all of them; memory in bytes, of a GPU and of a node's host.

    sp_degree: GPUs that share a sequence (default: all). mode: a name, or "auto". seq_length: None for the longest.
    """

    model: MemoryShape
    windows: Mapping[int | None, int]
    device: Device
    gpus: int
    nodes: int
    gpu_memory: float
    host_memory: float
    engine: str
    mode: str = AUTO
    ring_degree: int | None = None
    sp_degree: int | None = None
    seq_length: int | None = None
    batch: int = 1
    accumulate: int = 1
    kernel: str = "auto"
    optimizer: str = "adamw"

    @property
    def sharing(self) -> int:
        """GPUs that share one sequence."""
        return 1 if self.mode == "data_parallel" else self.gpus if self.sp_degree is None else self.sp_degree

    @property
    def cluster(self) -> Cluster:
        """Those of one sequence."""
        return Cluster.of(self.device, self.sharing, self.gpus // self.nodes)

    @property
    def budget(self) -> Budget:
        return Budget(usable_gpu_memory(int(self.gpu_memory)), int(self.host_memory))


@dataclass(frozen=True)
class Plan:
    """What was found. decision: None where `length` does not fit; then `closest` is what came nearest.

    steps: predicted steps by mode (with its ring degree), fastest first, with the memory choices of the chosen mode.
    asks_tiled: whether it fits with `--loss tiled` alone, where the train loop by itself would hold all logits.
    """

    request: Request
    length: int
    longest: int
    mode: str
    ring_degree: int | None
    decision: Decision | None
    closest: Decision | None = None
    steps: dict[str, StepCost] = field(default_factory=dict)
    asks_tiled: bool = False


def make_plan(request: Request) -> Plan:
    """Raises ValueError for a mode, degrees or heads that cannot be, and where no length at all fits."""
    check(request)
    mode, ring_degree = chosen_mode(request, request.seq_length or PROBE * request.sharing)
    longest = longest_length(request, mode, ring_degree)
    if request.seq_length is None and longest:
        at_first = (mode, ring_degree)
        mode, ring_degree = chosen_mode(request, longest)
        if (mode, ring_degree) != at_first:
            longest = longest_length(request, mode, ring_degree)
    length = request.seq_length or longest
    if length == 0:
        raise ValueError(_nothing_fits(request, mode, ring_degree))
    try:
        decision, asks_tiled = decide_with_loss(request, mode, ring_degree, length)
    except DoesNotFit as error:
        return Plan(request, length, longest, mode, ring_degree, None, error.best)
    steps = {
        step_name(name, degree): step_at(request, name, degree, length, decision.choices)
        for name, degree in modes_that_run(request, length)
    }
    steps = dict(sorted(steps.items(), key=lambda item: item[1].seconds))
    return Plan(request, length, longest, mode, ring_degree, decision, None, steps, asks_tiled)


def step_name(mode: str, ring_degree: int | None) -> str:
    """A mode with its ring degree, in words."""
    return f"{mode} (ring {ring_degree})" if ring_degree else mode


def check(request: Request) -> None:
    """ValueError for numbers and degrees that cannot be, before anything is worked out."""
    flags = {"gpus": "gpus", "nodes": "nodes", "batch": "batch-size", "accumulate": "gradient-accumulate-every"}
    for name, flag in flags.items():
        if (value := getattr(request, name)) < 1:
            raise ValueError(f"--{flag} is {value}, and must be at least 1")
    if request.seq_length is not None and request.seq_length < 2:
        raise ValueError(f"--seq-length is {request.seq_length}, and a sequence needs at least 2 tokens")
    if request.budget.gpu <= 0:
        raise ValueError(
            f"--gpu-memory is {request.gpu_memory / GIB:.3g} GiB, and CUDA and NCCL alone take "
            f"{BESIDE_PYTORCH / GIB:.0f} GiB: name a larger GPU"
        )
    if request.gpus % request.nodes:
        raise ValueError(f"--gpus {request.gpus} do not divide into --nodes {request.nodes}: --gpus counts all of them")
    if request.gpus > MOST_GPUS:
        raise ValueError(f"--gpus is {request.gpus}, and plans are made for at most {MOST_GPUS:,}: name fewer")
    if request.sharing < 1 or request.gpus % request.sharing:
        raise ValueError(
            f"--sp-degree {request.sp_degree} does not divide the {request.gpus} GPUs of --gpus: "
            f"use one of {divisors(request.gpus)}"
        )
    if request.mode in (AUTO, "data_parallel"):
        if request.mode != AUTO or request.sharing == 1:
            check_mode("data_parallel", request.sp_degree, request.gpus, request.ring_degree)
        return
    if request.sharing == 1:
        raise ValueError(
            f"{request.mode} shares a sequence among 2 or more GPUs, and here it is one: use data_parallel"
        )
    get_mode(request.mode).check_heads(
        request.model.q_heads, request.model.kv_heads, request.sharing, request.ring_degree
    )


def chosen_mode(request: Request, length: int) -> tuple[str, int | None]:
    """The mode asked for, or the one that `--parallel_mode auto` would take at this length."""
    if request.sharing == 1:
        return "data_parallel", None
    if request.mode != AUTO:
        return request.mode, request.ring_degree
    found = _candidates(request, length)
    if not found:
        raise ValueError(
            f"no mode has a ring degree of {request.ring_degree} over {request.sharing} GPUs: leave it out"
        )
    return best(found).mode, best(found).ring_degree


def modes_that_run(request: Request, length: int) -> list[tuple[str, int | None]]:
    """Every mode with these heads and GPUs; of those with two degrees the fastest. The one asked for comes first."""
    if request.sharing == 1:
        return [("data_parallel", None)]
    asked = [] if request.mode == AUTO else [(request.mode, request.ring_degree)]
    found = dict(reversed([(c.mode, c.ring_degree) for c in _candidates(request, length)]))  # the fastest stays
    return asked + [(mode, degree) for mode, degree in found.items() if mode not in dict(asked)]


def _candidates(request: Request, length: int) -> list[Candidate]:
    model, tokens = request.model, -(-length // request.sharing)
    shape = Shape(tokens, model.q_heads, model.kv_heads, model.head_dim, batch=request.batch)
    degree = None if request.mode not in (AUTO, "usp_attn") else request.ring_degree
    return candidates(shape, request.cluster, request.windows, ring_degree=degree, kernel=request.kernel)


def setting_at(request: Request, mode: str, ring_degree: int | None, length: int) -> Setting:
    """The memory model's view of the request."""
    degree = request.sharing
    ring = MODES[mode].check_ring_degree(ring_degree, degree) if degree > 1 else 1
    tokens = request.batch * -(-length // degree)
    return Setting(
        tokens=tokens,
        engine=request.engine,
        ranks=request.gpus,
        local_ranks=request.gpus // request.nodes,
        ring=ring,
        ulysses=degree // ring,
        kernel=_name_of_kernel(request),
        widths=widths_of(request),
        weight_bytes=4 if request.model.adapters is None else 2,
        optimizer=request.optimizer,
        accumulates=request.accumulate > 1,
        tiled_loss=tokens * request.model.vocab > SMALL_LOGITS,
    )


def _name_of_kernel(request: Request) -> str:
    """As `easyctx.memory.working_set` knows it."""
    name = kernel_rates(request.device, request.kernel).name
    keeps_sums = request.device.family == "hopper" and request.model.head_dim in HOPPER_HEAD_DIMS
    return BY_BLOCKS if name == "flash4" and not keeps_sums else name


def widths_of(request: Request) -> Widths:
    """Under DDP autocast leaves the residual stream as the weights are; engines that shard compute in bfloat16."""
    return Widths(stream=4 if request.engine == "ddp" and request.model.adapters is None else 2)


def longest_length(request: Request, mode: str, ring_degree: int | None) -> int:
    """Tokens of the longest sequence for which some choice fits; 0 if none does.

    The choices that take the least memory decide: attention in as many groups as the heads allow, tiles everywhere.
    """
    setting = replace(setting_at(request, mode, ring_degree, STEP_OF_LENGTH * request.sharing), tiled_loss=True)
    groups = max(
        g
        for g in (1, 2, 4, 8, 16)
        if g == 1 or (request.model.kv_heads % g == 0 and request.model.kv_heads // g % setting.ulysses == 0)
    )
    least = Wishes(mlp_tile=0 if request.model.is_mixture else MLP_TILE, tiled_norms=True, head_groups=groups)
    tokens = longest_that_fits(request.model, setting, request.budget, least, step=STEP_OF_LENGTH)
    return tokens // request.batch * request.sharing


def decide_at(request: Request, mode: str, ring_degree: int | None, length: int) -> Decision:
    """Raises DoesNotFit."""
    return decide_with_loss(request, mode, ring_degree, length)[0]


def decide_with_loss(request: Request, mode: str, ring_degree: int | None, length: int) -> tuple[Decision, bool]:
    """And whether that takes `--loss tiled`: what has few logits holds them all, if these fit. Raises DoesNotFit."""
    setting = setting_at(request, mode, ring_degree, length)
    try:
        return decide(request.model, setting, request.budget, Wishes(), length), False
    except DoesNotFit:
        if setting.tiled_loss:
            raise
    return decide(request.model, replace(setting, tiled_loss=True), request.budget, Wishes(), length), True


def step_at(request: Request, mode: str, ring_degree: int | None, length: int, choices: Choices) -> StepCost:
    return step_cost(
        Step(
            request.model,
            length,
            request.cluster,
            mode,
            choices,
            request.engine,
            ring_degree,
            request.gpus,
            request.batch,
            request.accumulate,
            request.windows,
            request.kernel,
            widths=widths_of(request),
            optimizer=request.optimizer,
        )
    )


def _nothing_fits(request: Request, mode: str, ring_degree: int | None) -> str:
    try:
        decide_at(request, mode, ring_degree, STEP_OF_LENGTH * request.sharing)
        needs = "too little is left for even one tile of activations"
    except DoesNotFit as error:
        predicted = error.best.predicted
        needs = (
            f"{STEP_OF_LENGTH} tokens a GPU take {predicted.gpu_peak / GIB:.1f} GiB of a GPU's "
            f"{request.budget.gpu / GIB:.1f} and {predicted.host_peak / GIB:.1f} GiB of a node's "
            f"{request.budget.host / GIB:.1f} GiB of host memory"
        )
    way_out, adapters = "more GPUs or more memory", request.model.adapters
    name = "fsdp2_offload" if adapters is not None and adapters.quantize else "zero3_offload"
    offloads = f"an engine that offloads (--engine {name})"
    if request.optimizer != "adamw":
        way_out = f"--optimizer adamw and {offloads}, {way_out}"
    elif not ENGINES[request.engine].offloads:
        way_out = f"{offloads}, {way_out}"
    return f"the model does not fit at any length with --engine {request.engine}: {needs}. Take {way_out}"
