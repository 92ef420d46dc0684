"""PyTorch's blocked CPU attention, which returns the log-sum-exp: float16 to float64, GQA as it is."""

import torch

from easyctx.band import Band
from easyctx.kernel.base import Gradients, Kernel, Saved, Workload, transpose


class TorchCpu(Kernel):
    """`aten::_scaled_dot_product_flash_attention_for_cpu`; a window costs a mask of the block's size."""

    name = "torch_cpu"

    def refuses(self, work: Workload) -> str | None:
        return None if work.device.type == "cpu" else f"runs on a CPU only, not on {work.device.type}"

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *transpose(q_BSHD, k_BSKD, v_BSKD),
            0.0,
            band.is_causal,
            attn_mask=_bias(q_BSHD, k_BSKD, band),
            scale=scale,
        )
        return out.transpose(1, 2), lse

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, scale: float) -> Gradients:
        q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS = saved
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *transpose(dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD),
            lse_BHS,
            0.0,
            band.is_causal,
            attn_mask=_bias(q_BSHD, k_BSKD, band),
            scale=scale,
        )
        dq, dk, dv = transpose(dq, dk, dv)
        return dq, dk, dv


def _bias(q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, band: Band) -> torch.Tensor | None:
    """The additive mask that the op wants where "causal" does not say it all."""
    if band.is_full or band.is_causal:
        return None
    allowed = band.allowed(q_BSHD.shape[1], k_BSKD.shape[1], q_BSHD.device)
    return torch.zeros(allowed.shape, dtype=q_BSHD.dtype).masked_fill_(~allowed, float("-inf"))[None, None]
