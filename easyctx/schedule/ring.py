"""Ring attention (arXiv 2310.01889): keys and values travel round the ring, and their gradients travel home.

The schedule is the same for every layout; which blocks a rank computes at each hop is the layout's `plan`.
"""

from collections.abc import Iterator

import torch

from easyctx.band import Block
from easyctx.kernel import Gradients, Saved
from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG
from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.exchange import Exchange
from easyctx.schedule.merge import Accumulator


class Ring(Schedule):
    """At hop i, rank r works on the keys of rank r - i while they are on their way to rank r + 1."""

    name = "ring"
    layouts = (CONTIGUOUS, ZIGZAG, STRIPED)

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = Accumulator(q_BSHD)
        travel = _TravellingKeys(k_BSKD, v_BSKD, call)
        for blocks, k, v in travel:
            for block in blocks:
                part = call.kernel.forward(q_BSHD[:, block.q], k[:, block.k], v[:, block.k], block.band, call.scale)
                total.add(block.q, *part)
        return total.result()

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        q, k, v, exact = saved.q_BSHD, saved.k_BSKD, saved.v_BSKD, saved.lse_BHS.dtype
        dq = torch.zeros_like(q, dtype=exact, memory_format=torch.contiguous_format)
        travel = _TravellingKeys(k, v, call)
        gradients = _TravellingGradients(k, exact, call, travel.num_hops)
        for hop, (blocks, hop_k, hop_v) in enumerate(travel):
            parts = []
            for block in blocks:
                of_block = saved.of_block(block.q, hop_k[:, block.k], hop_v[:, block.k])
                part_dq, part_dk, part_dv = call.kernel.backward(
                    dout_BSHD[:, block.q], of_block, block.band, call.scale
                )
                dq[:, block.q] += part_dq
                parts.append((block.k, part_dk, part_dv))
            gradients.add(hop, parts)
        # dk and dv come in one buffer; an operator's outputs may not share memory.
        dk, dv = (part.to(k.dtype, copy=True) for part in gradients.home())
        return dq.to(q.dtype), dk, dv


class _TravellingKeys:
    """Iterates over (blocks, k, v) of one owner after the other; the next ones travel while a caller computes.

    Keys and values are one message, in two buffers that take turns.
    """

    def __init__(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention) -> None:
        self.call = call
        self.seq_len = k_BSKD.shape[1] * call.mesh.sp_size
        self.num_hops = call.layout.num_hops(self.seq_len, call.mesh.sp_size, call.window)
        self.here = torch.stack([k_BSKD, v_BSKD])

    def __iter__(self) -> Iterator[tuple[tuple[Block, ...], torch.Tensor, torch.Tensor]]:
        layout, mesh = self.call.layout, self.call.mesh
        exchange = Exchange(mesh)
        here, spare = self.here, torch.empty_like(self.here)
        for hop in range(self.num_hops + 1):
            if hop < self.num_hops:
                exchange.start(here, spare)
            owner = (mesh.sp_rank - hop) % mesh.sp_size
            blocks = layout.plan(self.seq_len, mesh.sp_size, mesh.sp_rank, owner, self.call.window)
            yield blocks, here[0], here[1]
            if hop < self.num_hops:
                exchange.wait()
                here, spare = spare, here


class _TravellingGradients:
    """dk and dv of one owner after the other, one hop behind its keys; each rank adds its share and sends them on.

    They are sums over ranks, so they travel in the exact dtype (float32 for half precision): the error does not
    grow with the ring.
    """

    def __init__(self, k_BSKD: torch.Tensor, dtype: torch.dtype, call: Attention, num_hops: int) -> None:
        self.num_hops = num_hops
        self.exchange = Exchange(call.mesh)
        self.here = torch.zeros((2, *k_BSKD.shape), dtype=dtype, device=k_BSKD.device)
        self.spare = torch.empty_like(self.here)

    def add(self, hop: int, parts: list[tuple[slice, torch.Tensor, torch.Tensor]]) -> None:
        """Take over the sums that belong to this hop's keys, add this rank's parts, send them on."""
        if hop > 0:
            self._arrive()
        for keys, dk, dv in parts:
            self.here[0][:, keys] += dk
            self.here[1][:, keys] += dv
        if hop < self.num_hops:
            self.exchange.start(self.here, self.spare)

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The finished sums, sent back from the last rank that added to them to the rank that owns the keys."""
        if self.num_hops:
            self.exchange.start(self.here, self.spare, hops=-self.num_hops)
            self._arrive()
        return self.here[0], self.here[1]

    def _arrive(self) -> None:
        self.exchange.wait()
        self.here, self.spare = self.spare, self.here
