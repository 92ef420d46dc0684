"""PyTorch's blocked CPU attention, which returns the log-sum-exp: float16 to float64, GQA as it is."""

import torch

from easyctx.band import Band
from easyctx.kernel.base import Kernel, Workload, transpose
from easyctx.kernel.values import Gradients, Saved, Score


class TorchCpu(Kernel):
    """`aten::_scaled_dot_product_flash_attention_for_cpu`: full and causal blocks (from the top left corner)."""

    name = "torch_cpu"

    def refuses(self, work: Workload) -> str | None:
        if work.device.type != "cpu":
            return f"runs on a CPU only, not on {work.device.type}"
        if work.windowed:
            return "would need a mask of the block's size for a sliding window"
        return "has no softcap" if work.softcapped else None

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert band.is_full or band.is_causal
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *transpose(q_BSHD, k_BSKD, v_BSKD), 0.0, band.is_causal, scale=score.scale
        )
        return out.transpose(1, 2), lse

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        assert band.is_full or band.is_causal
        q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS = saved
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *transpose(dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD),
            lse_BHS,
            0.0,
            band.is_causal,
            scale=score.scale,
        )
        dq, dk, dv = transpose(dq, dk, dv)
        return dq, dk, dv
