"""Other ways to train that benchmarks/train_step.py times, under the same engine as easyctx.

All run `easyctx.train.train_step` on the same random weights and tokens. They differ in attention, in what is kept for
the backward and in the loss. DeepSpeed's own way has an engine of its own: `alst.py`.
"""

import argparse
from contextlib import AbstractContextManager
from typing import Any

import torch
from attention_parts import flash_attn_stand_in
from attention_parts.rivals import causal_attention, context_parallel_region
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface

from easyctx.backend import OWN, check_backend
from easyctx.kernel import KERNELS, Workload
from easyctx.patch import use_own_attention
from easyctx.training.memory import decide_memory
from easyctx.training.model import patch_model
from step_parts.loss import use_rivals_loss
from step_parts.method import Method, Row

FLASH2 = "torch_flash"  # FlashAttention 2, as PyTorch carries it


class Rival(Method):
    """Another way to train: with the fused loss that all of them have, and everything recomputed."""

    name: str

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        super().__init__(args, flags)
        self.config.loss, self.loss = "tiled", use_rivals_loss(self.device)
        # Not planned for, so not refused either: it runs out of memory where it does.
        self.config.gpu_memory = 1 << 20

    @property
    def label(self) -> str:
        return self.name

    def check(self) -> None:
        if self.sequences > 1:
            raise ValueError(
                f"{self.label} is compared with all {self.num_processes} processes on one sequence, and --sp-degree "
                f"is {self.config.sp_degree}: leave it out"
            )

    def recompute_all(self) -> None:
        self.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class EasyContext(Rival):
    """EasyContext's recipe on today's stack: ring-flash-attn's zigzag ring over FlashAttention 2, all recomputed."""

    mode = "zigzag_ring_attn"
    name = "easycontext"

    def check(self) -> None:
        super().check()
        if self.num_processes > 1:
            self.stands_in = flash_attn_stand_in.install()
            check_backend("ring_flash_attn", self.mode or "")
            self.config.attn_backend = "ring_flash_attn"
            return
        if self.device.type != "cuda":
            raise ValueError("easycontext on one process is FlashAttention 2 alone, which runs on CUDA only")
        work = Workload(self.device, torch.bfloat16, self.hf_config.head_dim)
        self.config.attn_kernel = FLASH2 if KERNELS["flash2"].refuses(work) else "flash2"

    def arrange(self, length: int) -> Row:
        self.config.seq_length = length
        row = self.keep()
        if self.config.attn_backend == OWN:
            use_own_attention(self.inner, mesh=self.mesh, kernel=self.config.attn_kernel)
            return row | {"kernel": self.config.attn_kernel, "loss_by": self.loss}
        kernel = "flash-attn 2"
        if self.stands_in:
            kernel = "PyTorch's FlashAttention 2" if self.device.type == "cuda" else "easyctx's tiles"
        return row | {"kernel": f"ring-flash-attn over {kernel}", "loss_by": self.loss}

    def keep(self) -> Row:
        """Have layers' inputs kept on the GPU."""
        if self.config.attn_backend != OWN:
            patch_model(self.inner, self.config, None, self.accelerator, self.mesh)
        self.recompute_all()
        return {"recompute": "all"}


class EasyContextOffload(EasyContext):
    """The same with layers' inputs on the host, by easyctx's own spill, which is kinder than EasyContext's copies."""

    name = "easycontext_offload"

    def keep(self) -> Row:
        kept = dict(recompute="all", keep_inputs="host", checkpoint_every=1, mlp_tile=0, tiled_norms="no")
        for name, value in kept.items():
            setattr(self.config, name, value)
        memory = decide_memory(self.config, self.hf_config, self.accelerator, self.mesh)
        patch_model(self.inner, self.config, memory, self.accelerator, self.mesh)
        return {"recompute": "all, inputs on the host"}


class ContextParallel(Rival):
    """PyTorch's context_parallel around scaled_dot_product_attention (cuDNN's), all recomputed."""

    mode = "zigzag_ring_attn"  # whose shards are those that context_parallel makes
    name = "context_parallel"

    def check(self) -> None:
        super().check()
        if self.num_processes > 1 and self.device.type != "cuda":
            raise ValueError(f"context_parallel has attention for CUDA only, not {self.device.type}")

    def arrange(self, length: int) -> Row:
        if length % (2 * self.num_processes):
            raise ValueError(
                f"context_parallel takes lengths that {2 * self.num_processes} (twice the processes) divides, not "
                f"{length}"
            )
        self.config.seq_length = length
        AttentionInterface.register("step_context_parallel", _sdpa)
        self.inner.set_attn_implementation("step_context_parallel")
        self.recompute_all()
        return {"recompute": "all", "kernel": _kernel(self.device), "loss_by": self.loss}

    def region(self) -> AbstractContextManager[Any]:
        return context_parallel_region(self.config.seq_length, self.device, SDPBackend.CUDNN_ATTENTION)


def _kernel(device: torch.device) -> str:
    return "cudnn" if device.type == "cuda" else "PyTorch's for CPUs"


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; it is never given a mask, being unknown to its masks' registry."""
    assert attention_mask is None
    return causal_attention(query, key, value, SDPBackend.CUDNN_ATTENTION, scaling).transpose(1, 2).contiguous(), None
