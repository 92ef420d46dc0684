"""DeepSpeed's ALST (arXiv 2506.13996) for benchmarks/train_step.py: Ulysses, ZeRO-3, tiled MLP, all recomputed.

Under DeepSpeed's own engine, set up as its tutorial does, with nothing offloaded: attention is
scaled_dot_product_attention (cuDNN's) behind `UlyssesSPAttentionHF`, the MLP goes through `TiledMLP`, bfloat16 weights
have float32 masters and Adam on the GPU. The loss is the fused one of the other methods.
"""

import argparse
import math
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from easyctx.inputs import prepare_seq_parallel_inputs
from easyctx.loss import global_sum, num_targets
from easyctx.training.objective import token_loss
from easyctx.training.optimizer import make_optimizer, set_learning_rate
from step_parts.loss import use_rivals_loss
from step_parts.models import model_config
from step_parts.settings import step_settings

Row = dict[str, Any]


class Alst:
    """As `method.Method`."""

    label, under = "alst", "DeepSpeed ZeRO-3"
    sequences, data_rank = 1, 0

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        try:
            import deepspeed
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        except ImportError as error:
            way_out = "pip install deepspeed==0.19.8 einops, with which this was run"
            raise ValueError(f"alst needs DeepSpeed's Ulysses for Hugging Face models ({error}): {way_out}") from error
        self.config = step_settings(args, flags)
        self.rank, self.num_processes = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if self.config.sp_degree not in (None, self.num_processes):
            raise ValueError(f"alst takes all {self.num_processes} processes for one sequence: leave --sp-degree out")
        self.device = _device()
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():  # else it looks for MPI
            os.environ.setdefault(name, value)
        deepspeed.init_distributed("nccl" if self.device.type == "cuda" else "gloo")
        self.hf_config = model_config(args.model, args.layers, max(args.seq_lengths))
        torch.manual_seed(self.config.seed)
        with self.device:  # the same random numbers as the other methods', rounded as they round them
            model = LlamaForCausalLM._from_config(self.hf_config, dtype=torch.float32, attn_implementation="sdpa")
        half = self.device.type == "cuda" or self.config.dtype == "bfloat16"
        model.to(torch.bfloat16 if half else torch.float32)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _tile_mlps()
        groups = UlyssesSPAttentionHF.register_with_transformers(
            model, "sdpa", self.num_processes, micro_batch_size=1, seq_length_is_variable=True
        )
        optimizer = make_optimizer(model, self.config)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_engine_settings(half), mpu=groups, dist_init_required=False
        )
        set_learning_rate(optimizer, 0.0)
        self.engine.train()
        self.loss = use_rivals_loss(self.device)

    def arrange(self, length: int) -> Row:
        if length % self.num_processes:
            raise ValueError(f"alst takes lengths that {self.num_processes} processes divide, not {length}")
        kernel = "cudnn" if self.device.type == "cuda" else "PyTorch's for CPUs"
        return {"recompute": "all, MLP tiled", "kernel": kernel, "loss_by": self.loss}

    def as_whole(self, row: Row, length: int) -> Row:
        return row

    def step(self, ids: torch.Tensor) -> tuple[float, float | None]:
        mode = "ulysses_attn" if self.num_processes > 1 else "data_parallel"
        targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
        local = prepare_seq_parallel_inputs(mode, ids, None, targets, self.rank, self.num_processes, self.device)
        targets = local["local_target_ids"]
        inputs = {name: local[f"local_{name}"] for name in ("input_ids", "position_ids")}
        valid = global_sum(num_targets(targets), self.device)
        # Called anew in the backward's recomputation, so both are inside.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.device.type == "cuda" else nullcontext():
            loss, _ = token_loss(self.engine, inputs, targets, "tiled")
            # ZeRO averages over all ranks.
            self.engine.backward(loss * self.num_processes / valid)
        self.engine.step()
        return global_sum(loss, self.device) / valid, float(self.engine.get_global_grad_norm())


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _engine_settings(half: bool) -> Row:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": half},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def _tile_mlps() -> None:
    """As ALST does: as many tiles of an MLP as its input is longer than wide."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    whole = LlamaMLP.forward

    def forward(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
        tiles = math.ceil(hidden.shape[1] / hidden.shape[2])
        weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
        return TiledMLP.apply(whole, mlp, hidden, tiles, weights)

    LlamaMLP.forward = forward
