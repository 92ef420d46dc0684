"""The 2-D mesh of processes: data parallel (dp) x sequence parallel (sp). Its groups are made once."""

import atexit
import gc
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True, eq=False)
class Mesh:
    """Where this process stands. The ranks of one sp group hold one sequence together and see the same sample."""

    sp_rank: int = 0
    sp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    sp_global_ranks: tuple[int, ...] = (0,)

    @property
    def sp_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that share a sequence; None where there is one process."""
        return _groups.get(self)

    def global_rank(self, sp_rank: int) -> int:
        return self.sp_global_ranks[sp_rank]

    def __str__(self) -> str:
        return f"SP {self.sp_size} x DP {self.dp_size}"


# All references to process groups that this package keeps, so that `leave_processes` can drop them.
_meshes: dict[tuple[int, int], tuple[object, Mesh]] = {}
_groups: dict[Mesh, dist.ProcessGroup] = {}


def num_processes() -> int:
    """Processes of this run, 1 where torch.distributed was not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_sp_degree(sp_degree: int | None, world_size: int) -> int:
    """The sequence-parallel degree to use (default: all processes); ValueError if it does not divide them."""
    degree = world_size if sp_degree is None else sp_degree
    if degree < 1 or world_size % degree:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise ValueError(
            f"a sequence-parallel degree of {degree} does not divide {world_size} processes: use one of {divisors}"
        )
    return degree


def make_mesh(sp_degree: int | None = None) -> Mesh:
    """This process's place in a mesh with `sp_degree` ranks to a sequence (default: all of them).

    All processes must call it, with the same degree; the process groups are made at the first call and kept.
    Neighbouring ranks share a sequence, so that an sp group stays on one node where it fits.
    """
    world_size = num_processes()
    sp_size = check_sp_degree(sp_degree, world_size)
    if world_size == 1:
        return Mesh()
    world = dist.group.WORLD
    made_for, mesh = _meshes.get((world_size, sp_size), (None, None))
    # A world that was torn down and built again has new groups.
    if mesh is None or made_for is not world:
        mesh = _make(world_size, sp_size)
        _meshes[(world_size, sp_size)] = (world, mesh)
    return mesh


def _make(world_size: int, sp_size: int) -> Mesh:
    device_type = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    shape = (world_size // sp_size, sp_size)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp", "sp"))
    group = device_mesh.get_group("sp")
    mesh = Mesh(
        sp_rank=device_mesh.get_local_rank("sp"),
        sp_size=sp_size,
        dp_rank=device_mesh.get_local_rank("dp"),
        dp_size=shape[0],
        sp_global_ranks=tuple(dist.get_process_group_ranks(group)),
    )
    if not _groups:
        atexit.register(leave_processes)
    _groups[mesh] = group
    return mesh


def leave_processes() -> None:
    """Give up all process groups, at the end of a run and at the latest when Python exits.

    A gloo group that is still alive when the interpreter goes down takes the process with it (SIGABRT, after all
    the work is done), so models and accelerators that hold one should be gone when this is called.
    """
    _meshes.clear()
    _groups.clear()
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
