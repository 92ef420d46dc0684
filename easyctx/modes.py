"""The modes by name. A new one is a schedule (one file) and a row here; choices and tests follow from this table."""

from dataclasses import dataclass
from typing import Literal

from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG, Layout, Split
from easyctx.mesh import ALONE, Axis, Mesh, check_ring_degree, check_sp_degree, divisors, make_mesh, num_processes
from easyctx.schedule import DistFlash, Ring, Schedule, Ulysses, check_heads


@dataclass(frozen=True)
class Mode:
    """A way to spread attention over processes. Without a schedule the model stays stock (one sequence a rank).

    layout: of the ring's shards.
    over: what the ranks that share a sequence are to the schedule: one ring, one Ulysses group, or a ring of them.
    """

    name: str
    summary: str
    layout: Layout = CONTIGUOUS
    schedule: Schedule | None = None
    over: Literal["ring", "ulysses", "both"] = "ring"

    def __post_init__(self) -> None:
        if self.schedule is not None and self.layout not in self.schedule.layouts:
            takes = ", ".join(layout.name for layout in self.schedule.layouts)
            raise ValueError(f"schedule {self.schedule.name} takes the layouts {takes}, not {self.layout.name}")

    @property
    def is_sequence_parallel(self) -> bool:
        return self.schedule is not None

    def check_ring_degree(self, given: int | None, sp_size: int) -> int:
        """How many of `sp_size` ranks form the ring.

        Raises ValueError if `given` is no divisor, missing where the mode needs it, or of no use in this mode.
        """
        own = {"ring": sp_size, "ulysses": 1}.get(self.over)
        if own is None:
            if given is None:
                raise ValueError(
                    f"{self.name} needs a ring degree (--ring_degree, ring_degree=…), how many of the {sp_size} ranks "
                    f"of a sequence form the ring: one of {divisors(sp_size)}"
                )
            return check_ring_degree(given, sp_size)
        if given not in (None, 1, own):
            what = f"one ring over all {sp_size} ranks" if self.over == "ring" else f"Ulysses over all {sp_size} ranks"
            raise ValueError(
                f"a ring degree of {given} was given, but {self.name} is {what} of a sequence: leave it out, or "
                "use usp_attn, which has both"
            )
        return own

    def shard_layout(self, sp_size: int, ring_degree: int | None = None) -> Layout:
        """Which positions each of the `sp_size` ranks of a sequence holds."""
        parts = sp_size // self.check_ring_degree(ring_degree, sp_size)
        return self.layout if parts == 1 else Split(self.layout, parts)

    def axes(self, mesh: Mesh) -> tuple[Axis, Axis]:
        """The (ring, Ulysses) axes on which the schedule runs."""
        if self.over == "both":
            self.check_ring_degree(mesh.ring_degree, mesh.sp_size)
            return mesh.ring, mesh.ulysses
        return (mesh.sp, ALONE) if self.over == "ring" else (ALONE, mesh.sp)

    def check_heads(self, q_heads: int, kv_heads: int, sp_size: int, ring_degree: int | None = None) -> None:
        """ValueError if these head counts cannot run on `sp_size` ranks; a ring takes any."""
        check_heads(q_heads, kv_heads, sp_size // self.check_ring_degree(ring_degree, sp_size))


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("data_parallel", "every process has its own sequence; the model's own attention"),
        Mode("ring_attn", "contiguous shards, keys travel round the ring", CONTIGUOUS, Ring()),
        Mode("zigzag_ring_attn", "the ring with the same causal work on every rank", ZIGZAG, Ring()),
        Mode("striped_attn", "the ring with every P-th token on a rank", STRIPED, Ring()),
        Mode("dist_flash_attn", "contiguous shards, idle ranks help loaded ones", CONTIGUOUS, DistFlash()),
        Mode(
            "ulysses_attn",
            "all-to-all: every rank has all tokens of some heads",
            CONTIGUOUS,
            Ulysses(Ring()),
            "ulysses",
        ),
        Mode("usp_attn", "a zigzag ring of Ulysses groups", ZIGZAG, Ulysses(Ring()), "both"),
    )
}

# Our operator on a whole sequence: for data parallelism with our kernels (`easyctx.patch.use_own_attention`).
WHOLE_SEQUENCE = Mode("data_parallel", "every process has its own sequence; our attention", CONTIGUOUS, Ring())


def get_mode(name: str) -> Mode:
    """The mode of that name; ValueError with all names if there is none."""
    if name not in MODES:
        raise ValueError(f"unknown parallel mode {name!r}: choose one of {', '.join(MODES)}")
    return MODES[name]


def check_mode(name: str, sp_degree: int | None, world_size: int, ring_degree: int | None = None) -> int:
    """The sequence-parallel degree that mode `name` runs with on `world_size` processes.

    Raises ValueError for an unknown mode, a degree that does not divide the processes, a sequence-parallel mode
    with nobody to share the sequence with, a degree given to data parallel, and a ring degree that the mode cannot
    have.
    """
    mode = get_mode(name)
    if not mode.is_sequence_parallel:
        for what, degree in (("sequence-parallel", sp_degree), ("ring", ring_degree)):
            if degree not in (None, 1):
                raise ValueError(
                    f"{name} has a {what} degree of 1, got {degree}: "
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
    mode.check_ring_degree(ring_degree, degree)
    return degree


def make_mode_mesh(name: str, sp_degree: int | None = None, ring_degree: int | None = None) -> Mesh:
    """The mesh that mode `name` runs on; every process must call it, with the same degrees.

    Raises ValueError for degrees that mode and processes cannot have (see `check_mode`).
    """
    degree = check_mode(name, sp_degree, num_processes(), ring_degree)
    return make_mesh(degree, ring_degree if get_mode(name).over == "both" else None)
