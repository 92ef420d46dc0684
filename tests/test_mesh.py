"""Groups of a mesh, as NCCL's would be made."""

import os

import pytest
import torch.distributed as dist

from easyctx import mesh
from easyctx.mesh import make_mesh, mesh_of_group

VARIABLE = "TORCH_NCCL_HIGH_PRIORITY"


def priorities(rank, world, setting, ring_degree):
    """What the variable was at each group that was made, and what it is behind that; on a world of its own meshes."""
    seen, make = [], dist.new_group
    os.environ.pop(VARIABLE, None)
    if setting is not None:
        os.environ[VARIABLE] = setting
    init = mesh.init_device_mesh

    def noted_mesh(*args, **kwargs):
        seen.append(os.environ.get(VARIABLE))
        return init(*args, **kwargs)

    def noted_group(*args, **kwargs):
        seen.append(os.environ.get(VARIABLE))
        return make(*args, **kwargs)

    known = dict(mesh._meshes)
    mesh._meshes.clear()
    mesh.init_device_mesh, mesh.dist.new_group = noted_mesh, noted_group
    try:
        make_mesh(ring_degree=ring_degree)
        mesh_of_group(ring_degree=ring_degree)
    finally:
        mesh.init_device_mesh, mesh.dist.new_group = init, make
        mesh._meshes.update(known)
        behind = os.environ.pop(VARIABLE, None)
    return seen, behind


@pytest.mark.parametrize("setting", [None, "0"])
def test_messages_come_before_attention_unless_the_user_says_otherwise(ranks, setting):
    for seen, behind in ranks(2).run(priorities, setting, 2):
        assert len(seen) >= 4 and set(seen) == {setting or "1"}
        assert behind == setting
