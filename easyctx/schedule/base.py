"""What a schedule is: who sends what when, so that every query meets every key it may see."""

from dataclasses import dataclass

import torch

from easyctx.kernel import Gradients, Kernel, RunningGradients, RunningOutput, Saved, Score
from easyctx.layout import Layout
from easyctx.mask import CAUSAL_MASK, Mask
from easyctx.mesh import ALONE, Axis


@dataclass(frozen=True)
class Attention:
    """One attention call as a schedule sees it.

    layout: which positions each rank of the ring axis holds (after Ulysses' exchange, where there is one).
    unrounded: results are wanted in the exact dtype, since more is done to them than storing them.
    """

    layout: Layout
    kernel: Kernel
    score: Score
    mask: Mask = CAUSAL_MASK
    ring: Axis = ALONE
    ulysses: Axis = ALONE
    unrounded: bool = False

    def output(self, q_BSHD: torch.Tensor) -> RunningOutput:
        """The attention of these queries, over nothing yet."""
        return self.kernel.output(q_BSHD, self.score, unrounded=self.unrounded)

    def gradients(self, dout_BSHD: torch.Tensor, saved: Saved) -> RunningGradients:
        """Their gradients, over nothing yet."""
        return self.kernel.gradients(dout_BSHD, saved, self.score, unrounded=self.unrounded)


class Schedule:
    """A distributed attention over the axes of an `Attention`.

    q, k, v are this rank's tokens, `[B, S/P, heads, D]`, in local order.
    """

    name: str
    layouts: tuple[Layout, ...]

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD` and `lse_BHS` of this rank's queries over the keys of all ranks; out may be unrounded."""
        raise NotImplementedError

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        """dq, dk and dv of this rank's tokens; they may be unrounded, and parts of one buffer."""
        raise NotImplementedError
