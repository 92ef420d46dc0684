"""Point-to-point messages between the ranks of a sequence-parallel group."""

from collections.abc import Sequence

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
        self._buffers: tuple[torch.Tensor | None, ...] = ()

    def start(self, send: torch.Tensor | None, receive: torch.Tensor | None, hops: int = 1) -> None:
        """Either buffer may be None, where the peer on that side has nothing to take or to give."""
        mesh = self.mesh
        to = mesh.global_rank((mesh.sp_rank + hops) % mesh.sp_size)
        source = mesh.global_rank((mesh.sp_rank - hops) % mesh.sp_size)
        # Both buffers must outlive the transfer, whatever the caller drops meanwhile.
        self._buffers = (send, receive)
        operations = []
        if send is not None:
            operations.append(dist.P2POp(dist.isend, send, to, group=mesh.sp_group))
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, receive, source, group=mesh.sp_group))
        self._requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for request in self._requests:
            request.wait()
        self._requests, self._buffers = [], ()


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors, of any dtypes, as one message: uint8 `[packed_size(tensors)]`.

    Give the widest dtype first, which keeps all of them aligned.
    """
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


def packed_size(like: Sequence[torch.Tensor]) -> int:
    """Bytes of the message that `pack` makes of tensors of these shapes and dtypes."""
    return sum(t.numel() * t.element_size() for t in like)


def unpack(message: torch.Tensor, like: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors in a message, as views of it, shaped and typed as `like`."""
    parts = message.split([t.numel() * t.element_size() for t in like])
    return tuple(part.view(t.dtype).view(t.shape) for part, t in zip(parts, like, strict=True))
