"""One device that plays one rank of P: messages are copies within it, on a stream of their own.

What is measured so is all of a mode but the network: block kernels at their sizes, merges, casts, launches, and copies
of as many bytes as would be sent. What arrives is what was sent, so results mean nothing and have no error.
"""

from collections.abc import Callable

import torch

from attention_parts.cases import Case
from attention_parts.methods import Method, differentiable
from easyctx.attention import Context, register_context, register_documents, seq_parallel_attention
from easyctx.layout import CONTIGUOUS
from easyctx.mesh import Axis, Mesh, _transports
from easyctx.modes import MODES, Mode
from easyctx.schedule import DistFlash


class LoopbackTransport:
    """Every peer is this device (see `easyctx.transport.Transport`)."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def exchange(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> Callable[[], None]:
        if receive is None:
            return lambda: None
        if self.stream is None:
            _copy_over(receive, send)
            return lambda: None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            _copy_over(receive, send)
        return lambda: torch.cuda.current_stream().wait_stream(self.stream)

    def all_to_all(self, send: torch.Tensor) -> Callable[[], torch.Tensor]:
        send = send.contiguous()
        received = torch.empty_like(send)
        wait = self.exchange(send, 0, received, 0)

        def arrived() -> torch.Tensor:
            assert send.shape == received.shape  # held until then
            wait()
            return received

        return arrived


def _copy_over(receive: torch.Tensor, send: torch.Tensor | None) -> None:
    """Fill a buffer with the bytes that are sent, as often as they fit."""
    into = receive.view(-1).view(torch.uint8)
    if send is None:
        into.zero_()
        return
    source = send.reshape(-1).view(torch.uint8)
    for start in range(0, into.numel(), source.numel()):
        part = into[start : start + source.numel()]
        part.copy_(source[: part.numel()])


def loopback(mode_name: str, kernel: str, case: Case, ring_degree: int) -> tuple[Method, int, float]:
    """A mode on the rank that has most to do, that rank, and its pairs, in the mean over all query heads.

    A rank's pairs are those of its queries; an even share with dist_flash_attn, which levels them. The method takes
    any tensors of the rank's size.
    """
    mode = MODES[mode_name]
    degree = mode.check_ring_degree(ring_degree if mode.over == "both" else None, case.ranks)
    parts = case.ranks // degree  # ranks of a Ulysses group
    shares = [_pairs(mode, case, r, degree) for r in range(degree)]
    ring_rank = max(range(degree), key=shares.__getitem__)
    mesh = _mesh(mode, case, degree, ring_rank)
    context = register_context(Context(mode, mesh, kernel))
    window, documents = case.mask.window or 0, register_documents(case.mask.documents)

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        return seq_parallel_attention(*qkv, None, case.head_dim**-0.5, 0.0, window, documents, context)[0]

    rank = ring_rank * parts
    return differentiable(mode_name, kernel, CONTIGUOUS, attention), rank, shares[ring_rank] / parts


def _pairs(mode: Mode, case: Case, ring_rank: int, degree: int) -> float:
    if isinstance(mode.schedule, DistFlash):
        return case.pairs() / degree
    return case.pairs(mode.layout.positions(case.length, degree, ring_rank))


def _mesh(mode: Mode, case: Case, degree: int, ring_rank: int) -> Mesh:
    parts = case.ranks // degree
    axes = (Axis(ring_rank * parts, case.ranks), Axis(ring_rank, degree), Axis(0, parts))
    for axis in axes:
        _transports[axis] = LoopbackTransport(case.device)
    sp, ring, ulysses = axes
    return Mesh(sp=sp, ring=ring, ulysses=ulysses) if mode.over == "both" else Mesh(sp=sp)
