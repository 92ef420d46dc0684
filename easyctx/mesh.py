"""The mesh of processes: data parallel (dp) x sequence parallel (sp), the latter ring x Ulysses for `usp_attn`.

Its process groups are made once.
"""

import atexit
import gc
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from easyctx.transport import GroupTransport, Transport


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of the mesh as one process sees it: its rank among the `size` ranks that exchange messages."""

    rank: int = 0
    size: int = 1

    @property
    def transport(self) -> Transport:
        return _transports[self]

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None where there is one process, and after `leave_processes`."""
        transport = _transports.get(self)
        return transport.group if isinstance(transport, GroupTransport) else None


ALONE = Axis()


@dataclass(frozen=True, eq=False)
class Mesh:
    """Where this process stands. The ranks of the sp axis hold one sequence together and see the same sample.

    ring, ulysses: the sp axis in two (`usp_attn`), neighbouring ranks being of one Ulysses group; both ALONE where
    it was not asked for.
    """

    sp: Axis = ALONE
    dp: Axis = ALONE
    ring: Axis = ALONE
    ulysses: Axis = ALONE

    @property
    def sp_rank(self) -> int:
        return self.sp.rank

    @property
    def sp_size(self) -> int:
        return self.sp.size

    @property
    def dp_rank(self) -> int:
        return self.dp.rank

    @property
    def dp_size(self) -> int:
        return self.dp.size

    @property
    def ring_degree(self) -> int | None:
        """Ranks of the ring axis, None where the sp axis was not split."""
        return self.ring.size if self.ring.size * self.ulysses.size == self.sp.size else None

    @property
    def sp_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that share a sequence; None where there is one process."""
        return self.sp.group

    def __str__(self) -> str:
        is_split = self.ring_degree and self.sp_size > 1
        inside = f" (ring {self.ring.size} x Ulysses {self.ulysses.size})" if is_split else ""
        return f"SP {self.sp_size}{inside} x DP {self.dp_size}"


# All references to process groups that this package keeps, so that `leave_processes` can drop them.
_transports: dict[Axis, Transport] = {}
_meshes: dict[tuple[dist.ProcessGroup | None, int | None, int | None], Mesh] = {}


def num_processes() -> int:
    """Processes of this run, 1 where torch.distributed was not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def check_sp_degree(sp_degree: int | None, world_size: int) -> int:
    """The sequence-parallel degree to use (default: all processes); ValueError if it does not divide them."""
    degree = world_size if sp_degree is None else sp_degree
    if degree < 1 or world_size % degree:
        raise ValueError(
            f"a sequence-parallel degree of {degree} does not divide {world_size} processes: "
            f"use one of {divisors(world_size)}"
        )
    return degree


def check_ring_degree(ring_degree: int, sp_size: int) -> int:
    """The ring degree; ValueError if it does not divide the sequence-parallel degree."""
    if ring_degree < 1 or sp_size % ring_degree:
        raise ValueError(
            f"a ring degree of {ring_degree} does not divide the {sp_size} ranks that share a sequence: "
            f"use one of {divisors(sp_size)}"
        )
    return ring_degree


def make_mesh(sp_degree: int | None = None, ring_degree: int | None = None) -> Mesh:
    """This process's place in a mesh with `sp_degree` ranks to a sequence (default: all of them).

    All processes must call it, with the same degrees; the process groups are made at the first call and kept.
    Neighbouring ranks share a sequence, so that an sp group stays on one node where it fits.

    Args:
        sp_degree: ranks that share a sequence.
        ring_degree: for `usp_attn`: so many of them form a ring, of groups that run Ulysses inside.
    """
    world_size = num_processes()
    sp_size = check_sp_degree(sp_degree, world_size)
    if ring_degree is not None:
        check_ring_degree(ring_degree, sp_size)
    if world_size == 1:
        return Mesh()
    # A world that was torn down and built again is another group, with groups of its own.
    key = (dist.group.WORLD, sp_size, ring_degree)
    if key not in _meshes:
        _meshes[key] = _make(world_size, sp_size, ring_degree)
    return _meshes[key]


def set_message_timeout(mesh: Mesh, seconds: float) -> None:
    """How long a message of the mesh's groups may be under way; torch has 10 minutes for new groups of GPUs."""
    for axis in (mesh.sp, mesh.dp, mesh.ring, mesh.ulysses):
        if axis.group is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), axis.group)


def mesh_of_group(group: dist.ProcessGroup | None = None, ring_degree: int | None = None) -> Mesh:
    """A mesh whose sp axis is a process group that exists already (default: all processes).

    Only ranks of the group may call it, and with `ring_degree` all of them must.
    """
    if num_processes() == 1:
        return Mesh()
    whole = group or dist.distributed_c10d._get_default_group()
    key = (whole, None, ring_degree)
    if key not in _meshes:
        sp = _axis(whole)
        ring, ulysses = (
            (ALONE, ALONE) if ring_degree is None else _split(whole, check_ring_degree(ring_degree, sp.size))
        )
        _meshes[key] = Mesh(sp=sp, ring=ring, ulysses=ulysses)
    return _meshes[key]


def _make(world_size: int, sp_size: int, ring_degree: int | None) -> Mesh:
    device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    names: tuple[str, ...] = ("dp", "sp")
    device_mesh = init_device_mesh(device_type, (world_size // sp_size, sp_size), mesh_dim_names=names)
    axes = {name: _axis(device_mesh.get_group(name)) for name in names}
    if ring_degree is not None:
        shape = (world_size // sp_size, ring_degree, sp_size // ring_degree)
        names = ("dp", "ring", "ulysses")
        inner = init_device_mesh(device_type, shape, mesh_dim_names=names)
        axes |= {name: _axis(inner.get_group(name)) for name in ("ring", "ulysses")}
    return Mesh(**axes)


def _split(group: dist.ProcessGroup, ring_degree: int) -> tuple[Axis, Axis]:
    """The ring and Ulysses axes of a group, neighbours in it being of one Ulysses group."""
    ranks, mine = dist.get_process_group_ranks(group), dist.get_rank()
    ulysses_degree = len(ranks) // ring_degree
    axes = []
    for parts in (
        [ranks[u::ulysses_degree] for u in range(ulysses_degree)],
        [ranks[r * ulysses_degree : (r + 1) * ulysses_degree] for r in range(ring_degree)],
    ):
        for part in parts:
            made = dist.new_group(part, use_local_synchronization=True) if mine in part else None
            if made is not None:
                axes.append(_axis(made))
    return axes[0], axes[1]


def _axis(group: dist.ProcessGroup) -> Axis:
    if not _transports:
        atexit.register(leave_processes)
    axis = Axis(dist.get_rank(group), dist.get_world_size(group))
    _transports[axis] = GroupTransport(group)
    _connect(group)
    return axis


def _connect(group: dist.ProcessGroup) -> None:
    """Have NCCL build the group's communicator, now that all its ranks are here.

    Otherwise the first messages do, and wait for every rank, also for those that a mask leaves nothing to send.
    """
    if "nccl" in str(dist.get_backend(group)):
        dist.all_reduce(torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device())), group=group)


def leave_processes() -> None:
    """Give up all process groups, at the end of a run and at the latest when Python exits.

    A gloo group that is still alive when the interpreter goes down takes the process with it (SIGABRT, after all
    the work is done), so models and accelerators that hold one should be gone when this is called.
    """
    is_joined = dist.is_available() and dist.is_initialized()
    if not (_transports or is_joined):
        return  # a collection takes long where much is loaded
    _meshes.clear()
    _transports.clear()
    gc.collect()
    if is_joined:
        dist.destroy_process_group()
