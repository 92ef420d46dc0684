"""Ring attention (arXiv 2310.01889): every rank's keys and values come by, and their gradients go home.

The schedule is the same for every layout; which blocks a rank computes of each owner's keys is the layout's `plan`.
How keys come is one of two ways: round the ring, from neighbour to neighbour, where every rank needs all of them
(`travel.py`); straight from their owner, and only the part that is needed, where a window or documents leave little
to be seen (`direct.py`).
"""

import torch

from easyctx.kernel import Gradients, Saved
from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG
from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.direct import DirectGradients, DirectKeys
from easyctx.schedule.merge import Accumulator
from easyctx.schedule.travel import TravellingGradients, TravellingKeys
from easyctx.schedule.work import attend, differentiate, new_dkv, new_dq


class Ring(Schedule):
    """At hop i, rank r works on the keys of rank r - i while the next ones are on their way."""

    name = "ring"
    layouts = (CONTIGUOUS, ZIGZAG, STRIPED)

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = Accumulator(q_BSHD)
        for arrival in _keys(k_BSKD, v_BSKD, call):
            attend(total, q_BSHD, arrival.k_BSKD, arrival.v_BSKD, arrival.blocks, call)
        return total.result()

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        q, k, v, out, lse = saved
        exact = lse.dtype
        dq = new_dq(q, exact)
        sums = (TravellingGradients if _goes_round(call, k.shape[1]) else DirectGradients)(k, exact, call)
        for arrival in _keys(k, v, call):
            dkv = new_dkv(arrival.k_BSKD, exact)
            of_owner = Saved(q, arrival.k_BSKD, arrival.v_BSKD, out, lse)
            differentiate(dq, dkv, dout_BSHD, of_owner, arrival.blocks, call)
            sums.add(arrival, dkv)
        dk, dv = sums.home()
        return dq, dk, dv


def _goes_round(call: Attention, local: int) -> bool:
    return call.mask.within(local * call.ring.size).is_causal


def _keys(k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention) -> "TravellingKeys | DirectKeys":
    return (TravellingKeys if _goes_round(call, k_BSKD.shape[1]) else DirectKeys)(k_BSKD, v_BSKD, call)
