"""Point-to-point messages along the ring of a sequence-parallel group."""

import torch
import torch.distributed as dist

from easyctx.mesh import Mesh


class Exchange:
    """Every rank sends one buffer `hops` ranks on and receives one from as far back, asynchronously.

    On NCCL `wait` makes the current stream wait, not the host.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._requests: list[dist.Work] = []
        self._buffers: tuple[torch.Tensor, ...] = ()

    def start(self, send: torch.Tensor, receive: torch.Tensor, hops: int = 1) -> None:
        mesh = self.mesh
        to = mesh.global_rank((mesh.sp_rank + hops) % mesh.sp_size)
        source = mesh.global_rank((mesh.sp_rank - hops) % mesh.sp_size)
        # Both buffers must outlive the transfer, whatever the caller drops meanwhile.
        self._buffers = (send, receive)
        self._requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, send, to, group=mesh.sp_group),
                dist.P2POp(dist.irecv, receive, source, group=mesh.sp_group),
            ]
        )

    def wait(self) -> None:
        for request in self._requests:
            request.wait()
        self._requests, self._buffers = [], ()
