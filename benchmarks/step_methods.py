"""Ways to train that benchmarks/train_step.py times: easyctx, and others under the same engine.

All run `easyctx.train.train_step` on the same random weights and tokens. They differ in attention, in what is kept for
the backward and in the loss. DeepSpeed's own way has an engine of its own: `step_alst.py`.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flash_attn_stand_in
import torch
from attention_rivals import causal_attention, context_parallel_region
from step_loss import use_rivals_loss
from step_models import model_config
from step_settings import step_settings
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AutoModelForCausalLM

from easyctx.backend import OWN, check_backend
from easyctx.engine import make_accelerator
from easyctx.kernel import KERNELS, Workload
from easyctx.memory.budget import GIB
from easyctx.memory.describe import describe_choices
from easyctx.memory.policy import usable_gpu_memory
from easyctx.modes import make_mode_mesh
from easyctx.patch import use_own_attention
from easyctx.train import train_step
from easyctx.training.memory import decide_memory, explained_out_of_memory
from easyctx.training.model import patch_model, weight_dtype
from easyctx.training.optimizer import make_optimizer, set_learning_rate

Row = dict[str, Any]
FLASH2 = "torch_flash"  # FlashAttention 2, as PyTorch carries it


class Method:
    """A model under an engine, on this rank. Weights never change, so every step of every method is the same step."""

    mode: str | None = None  # of the run that the user asked for, unless a method has its own

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        self.config = step_settings(args, flags)
        self.accelerator = make_accelerator(max_grad_norm=0.0)
        self.num_processes, self.device = self.accelerator.num_processes, self.accelerator.device
        mode = self.mode or self.config.parallel_mode
        if self.num_processes == 1:
            mode = "data_parallel"
        self.config.parallel_mode = mode
        self.mesh = make_mode_mesh(mode, self.config.sp_degree, self.config.ring_degree)
        self.hf_config = model_config(args.model, args.layers, max(args.seq_lengths))
        self.check()
        if self.config.gpu_memory is None and torch.cuda.is_available():
            self.config.gpu_memory = usable_gpu_memory(torch.cuda.mem_get_info(self.device)[0]) / GIB
        torch.manual_seed(self.config.seed)
        with self.device:
            model: Any = AutoModelForCausalLM.from_config(
                self.hf_config, dtype=weight_dtype(self.config.dtype, self.accelerator)
            )
        self.inner = model
        optimizer = make_optimizer(model, self.config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # Adam does all its work, and its step is nothing.
        set_learning_rate(self.optimizer, 0.0)
        self.model.train()

    @property
    def label(self) -> str:
        return f"easyctx {self.config.parallel_mode}"

    @property
    def sequences(self) -> int:
        """Of a step, over all ranks."""
        return self.mesh.dp_size

    @property
    def data_rank(self) -> int:
        """Which of these sequences is this rank's."""
        return self.mesh.dp_rank

    def check(self) -> None:
        """Raises ValueError for what is missing here, before there is a model."""

    def arrange(self, length: int) -> Row:
        """Make ready for steps of this length; what a row should say of it.

        Raises ValueError for a length that this method cannot do.
        """
        self.config.seq_length = length
        memory = decide_memory(self.config, self.hf_config, self.accelerator, self.mesh)
        patch_model(self.inner, self.config, memory, self.accelerator, self.mesh)
        row: Row = {"recompute": "as planned" if memory else "nothing"}
        if memory is not None:
            for line in memory.lines():
                self.accelerator.print(f"easyctx: {line}", flush=True)
            predicted = memory.decision.predicted
            row |= {
                "predicted_gpu_gib": predicted.gpu_peak / GIB,
                "predicted_host_gib": predicted.host_peak / GIB,
                "moment": predicted.moment,
                "choices": describe_choices(memory.decision.choices),
                "kernel": memory.setting.kernel,
            }
        return row

    def region(self) -> AbstractContextManager[Any]:
        """Held open around a step."""
        return nullcontext()

    def step(self, ids: torch.Tensor) -> tuple[float, float | None]:
        """One step on whole sequences `[1, S]`: the mean loss and the gradient norm."""
        batches = iter([{"input_ids": ids}])
        with explained_out_of_memory(self.model), self.region():
            return train_step(
                self.model, self.optimizer, batches, self.config, self.hf_config, self.accelerator, self.mesh
            )


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
