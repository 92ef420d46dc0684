"""What a schedule is: who sends what when, so that every query meets every key it may see."""

from dataclasses import dataclass

import torch

from easyctx.kernel import Gradients, Kernel, Saved
from easyctx.layout import Layout
from easyctx.mesh import Mesh


@dataclass(frozen=True)
class Attention:
    """One attention call as a schedule sees it."""

    layout: Layout
    mesh: Mesh
    kernel: Kernel
    scale: float
    window: int | None = None


class Schedule:
    """A distributed attention over the sequence-parallel group of `Attention.mesh`.

    q, k, v are this rank's tokens, `[B, S/P, heads, D]`, in the layout's local order.
    """

    name: str
    layouts: tuple[Layout, ...]

    def check_heads(self, q_heads: int, kv_heads: int, sp_size: int) -> None:
        """ValueError if these head counts cannot run on `sp_size` ranks; any can, unless a schedule says so."""

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out_BSHD` and `lse_BHS` of this rank's queries over the keys of all ranks."""
        raise NotImplementedError

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, call: Attention) -> Gradients:
        """dq, dk and dv of this rank's tokens, in their dtypes."""
        raise NotImplementedError
