"""The modes by name. A new one is a schedule (one file) and a row here; choices and tests follow from this table."""

from dataclasses import dataclass

from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG, Layout
from easyctx.mesh import check_sp_degree
from easyctx.schedule import DistFlash, Ring, Schedule, Ulysses


@dataclass(frozen=True)
class Mode:
    """A way to spread attention over processes. Without a schedule the model stays stock (one sequence a rank)."""

    name: str
    summary: str
    layout: Layout = CONTIGUOUS
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and self.layout not in self.schedule.layouts:
            takes = ", ".join(layout.name for layout in self.schedule.layouts)
            raise ValueError(f"schedule {self.schedule.name} takes the layouts {takes}, not {self.layout.name}")

    @property
    def is_sequence_parallel(self) -> bool:
        return self.schedule is not None


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("data_parallel", "every process has its own sequence; the model's own attention"),
        Mode("ring_attn", "contiguous shards, keys travel round the ring", CONTIGUOUS, Ring()),
        Mode("zigzag_ring_attn", "the ring with the same causal work on every rank", ZIGZAG, Ring()),
        Mode("striped_attn", "the ring with every P-th token on a rank", STRIPED, Ring()),
        Mode("dist_flash_attn", "contiguous shards, idle ranks help loaded ones", CONTIGUOUS, DistFlash()),
        Mode("ulysses_attn", "all-to-all: every rank has all tokens of some heads", CONTIGUOUS, Ulysses()),
    )
}


def get_mode(name: str) -> Mode:
    """The mode of that name; ValueError with all names if there is none."""
    if name not in MODES:
        raise ValueError(f"unknown parallel mode {name!r}: choose one of {', '.join(MODES)}")
    return MODES[name]


def check_mode(name: str, sp_degree: int | None, world_size: int) -> int:
    """The sequence-parallel degree that mode `name` runs with on `world_size` processes.

    Raises ValueError for an unknown mode, a degree that does not divide the processes, a sequence-parallel mode
    with nobody to share the sequence with, and a degree given to data parallel.
    """
    mode = get_mode(name)
    if not mode.is_sequence_parallel:
        if sp_degree not in (None, 1):
            raise ValueError(
                f"{name} has a sequence-parallel degree of 1, got {sp_degree}: "
                "leave the degree out or choose a sequence-parallel mode such as zigzag_ring_attn"
            )
        return 1
    degree = check_sp_degree(sp_degree, world_size)
    if degree == 1:
        raise ValueError(
            f"{name} shares one sequence among 2 or more processes, but the sequence-parallel degree is 1 and this "
            f"run has {world_size} process{'es' if world_size > 1 else ''}: launch more "
            "(accelerate launch --num_processes 2 …), raise the degree, or use data_parallel"
        )
    return degree
