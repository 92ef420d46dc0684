"""Moving buffers between the ranks of one mesh axis, and nothing else."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist


class Transport(Protocol):
    """What a schedule needs of the ranks it works with. Ranks are counted within the axis."""

    def exchange(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> Callable[[], None]:
        """Start sending one buffer and receiving another, either of which may be None; returns what waits for both.

        Both buffers must stay as they are until then.
        """

    def all_to_all(self, send: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start sending the r-th slice of dim 0 to rank r; returns what waits for the result and gives it.

        The r-th slice of the result came from rank r.
        """


class GroupTransport:
    """Over a torch.distributed process group, NCCL's or gloo's."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def exchange(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> Callable[[], None]:
        operations = []
        if send is not None:
            operations.append(dist.P2POp(dist.isend, send, group=self.group, group_peer=to))
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, receive, group=self.group, group_peer=source))
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            # On NCCL this makes the current stream wait, not the host.
            for request in requests:
                request.wait()

        return wait

    def all_to_all(self, send: torch.Tensor) -> Callable[[], torch.Tensor]:
        send = send.contiguous()
        received = torch.empty_like(send)
        request = dist.all_to_all_single(received, send, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            assert send.shape == received.shape  # held until then
            request.wait()
            return received

        return wait
