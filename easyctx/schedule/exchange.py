"""Point-to-point messages between the ranks of an axis."""

from collections.abc import Callable, Sequence

import torch

from easyctx.mesh import Axis


class Exchange:
    """Every rank sends one buffer `hops` ranks on and receives one from as far back, asynchronously."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._wait: Callable[[], None] | None = None
        self._buffers: tuple[torch.Tensor | None, ...] = ()

    def start(self, send: torch.Tensor | None, receive: torch.Tensor | None, hops: int = 1) -> None:
        """Either buffer may be None, where the peer on that side has nothing to take or to give."""
        axis = self.axis
        # Both buffers must outlive the transfer, whatever the caller drops meanwhile.
        self._buffers = (send, receive)
        to, source = (axis.rank + hops) % axis.size, (axis.rank - hops) % axis.size
        self._wait = axis.transport.exchange(send, to, receive, source)

    def wait(self) -> None:
        """On NCCL this makes the current stream wait, not the host."""
        if self._wait is not None:
            self._wait()
        self._wait, self._buffers = None, ()


def some(message: torch.Tensor | None) -> torch.Tensor | None:
    """The message, or None for an empty one, which is not sent."""
    return message if message is not None and message.numel() else None


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
