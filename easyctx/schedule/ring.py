"""Ring attention (arXiv 2310.01889): every rank meets every other rank's keys, and their gradients go home.

The schedule is the same for every layout; which blocks a rank computes of each owner's keys is the layout's `plan`.
"""

import torch

from easyctx.band import CAUSAL, FULL, Block
from easyctx.kernel import Gradients, Saved
from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG
from easyctx.schedule.base import Attention, Schedule
from easyctx.schedule.keys import GradientsHome, KeysOfOthers


class Ring(Schedule):
    """At hop i, rank r works on the keys of rank r - i while the next ones are on their way."""

    name = "ring"
    layouts = (CONTIGUOUS, ZIGZAG, STRIPED)

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = call.output(q_BSHD)
        keys = KeysOfOthers(k_BSKD, v_BSKD, call, at_once=_hops_at_once(k_BSKD))
        for arrival in keys:
            is_last_arrival = arrival.hops[-1] == (keys.pairs.hops or (0,))[-1]
            for i, block in enumerate(arrival.blocks, 1):
                is_last = is_last_arrival and i == len(arrival.blocks)
                total.add(arrival.k_BSKD, arrival.v_BSKD, block, is_last=is_last)
        return total.result()

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        gradients = call.gradients(dout_BSHD, saved)
        keys = KeysOfOthers(saved.k_BSKD, saved.v_BSKD, call)
        own = gradients.new_keys(saved.k_BSKD, keys.pairs.own)
        home = GradientsHome(own, keys.pairs, call.ring)
        first, last = _split_own(keys.pairs.own, saved.k_BSKD.shape[1] if keys.pairs.hops else 0)
        for arrival in keys:
            if arrival.hops == (0,):
                for block in first:
                    gradients.add(arrival.k_BSKD, arrival.v_BSKD, block, own)
                continue
            of_keys = gradients.new_keys(arrival.k_BSKD, arrival.blocks)
            for block in arrival.blocks:
                gradients.add(arrival.k_BSKD, arrival.v_BSKD, block, of_keys)
            home.send(arrival, of_keys)
        for block in last:
            gradients.add(saved.k_BSKD, saved.v_BSKD, block, own)
        home.collect()
        return gradients.dq(), *own.result()


MOST_HOPS_AT_ONCE = 4
KEYS_AT_ONCE = (
    1 << 14
)  # where ranks hold fewer, keys of several come together: every block costs a pass over the output


def _hops_at_once(k_BSKD: torch.Tensor) -> int:
    batch, local = k_BSKD.shape[:2]
    return 1 if batch > 1 else max(1, min(MOST_HOPS_AT_ONCE, KEYS_AT_ONCE // local))


OWN_ROWS_MULTIPLE = 256  # where this rank's own work is cut: a border of the kernels' tiles


def _split_own(blocks: tuple[Block, ...], local: int) -> tuple[list[Block], list[Block]]:
    """This rank's own blocks in two: the first part hides the first keys' arrival, the last one the last gradients'.

    The last part is the upper left quarter of a plain causal square. local: tokens of a rank, 0 where nothing travels.
    """
    middle = local // 2 // OWN_ROWS_MULTIPLE * OWN_ROWS_MULTIPLE
    if middle == 0 or len(blocks) != 1 or blocks[0].cuts or not blocks[0].band.is_causal:
        return list(blocks), []
    upper, lower = slice(0, middle), slice(middle, local)
    return [Block(lower, upper, FULL), Block(lower, lower, CAUSAL)], [Block(upper, upper, CAUSAL)]
