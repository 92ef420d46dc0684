"""Loading the model that a run trains: RoPE base, dtype, patch, memory."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from easyctx.backend import check_backend_config
from easyctx.capability import check_config
from easyctx.engine import manages_master_weights
from easyctx.mesh import Mesh
from easyctx.modes import get_mode
from easyctx.patch import apply_seq_parallel_monkey_patch, use_own_attention
from easyctx.training.config import TrainConfig
from easyctx.training.memory import RunMemory, apply_memory, decide_memory, recomputes_without_plan
from easyctx.training.objective import check_loss


def load_model_config(config: TrainConfig, sp_size: int) -> Any:
    """The model's configuration, with the new RoPE base and length, after every check that needs only it.

    Raises:
        ValueError: a model whose attention the mode cannot compute exactly.
    """
    try:
        model_config = AutoConfig.from_pretrained(config.model)
    except OSError as error:
        raise ValueError(f"--model {config.model} could not be loaded: {error}") from error
    check_config(model_config, get_mode(config.parallel_mode), sp_size, config.ring_degree)
    check_backend_config(config.attn_backend, config.parallel_mode, model_config, sp_size, config.ring_degree)
    set_rope(model_config, config.rope_theta, max(config.seq_length, config.pose_length or 0))
    return model_config


def set_rope(model_config: Any, rope_theta: float | None, seq_length: int) -> None:
    """Write a new RoPE base into a configuration, and raise its advertised length to `seq_length`.

    The length is raised only where RoPE does not depend on it (type "default").
    """
    rope = model_config.rope_parameters
    if rope_theta is not None:
        # Gemma 3 has a base for its sliding-window layers, which no length asks to be raised, and one for the rest.
        whole = rope.get("full_attention", rope)
        if "rope_theta" not in whole:
            raise ValueError(
                f"this {model_config.model_type} configuration has no single RoPE base ({sorted(rope)}): "
                "set rope_parameters in its config.json and leave --rope-theta out"
            )
        whole["rope_theta"] = float(rope_theta)
    if rope.get("full_attention", rope).get("rope_type", "default") == "default":
        model_config.max_position_embeddings = max(model_config.max_position_embeddings, seq_length)


def load_model(config: TrainConfig, model_config: Any, accelerator: Accelerator, mesh: Mesh) -> PreTrainedModel:
    """The model to train, patched for the run's mode and memory. ZeRO-3 shards it while it loads."""
    memory = decide_memory(config, model_config, accelerator, mesh)
    for line in memory.lines() if memory else ():
        accelerator.print(f"easyctx: {line}")
    model = AutoModelForCausalLM.from_pretrained(
        config.model, config=model_config, dtype=weight_dtype(config.dtype, accelerator)
    )
    check_loss(model, config.loss)
    patch_model(model, config, memory, accelerator, mesh)
    return model


def patch_model(
    model: PreTrainedModel, config: TrainConfig, memory: RunMemory | None, accelerator: Accelerator, mesh: Mesh
) -> None:
    """Give a model the attention of the run's mode, and have it keep what was decided."""
    groups = memory.decision.choices.head_groups if memory else 1
    if memory and memory.own_attention:
        use_own_attention(model, mesh=mesh, kernel=config.attn_kernel, head_groups=groups)
    else:
        apply_seq_parallel_monkey_patch(
            config.parallel_mode,
            model,
            mesh=mesh,
            kernel=config.attn_kernel,
            backend=config.attn_backend,
            head_groups=groups,
        )
    model.config.use_cache = False
    apply_memory(model, memory, accelerator.device)
    if recomputes_without_plan(config, model.config, accelerator.device):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def weight_dtype(name: str, accelerator: Accelerator) -> torch.dtype:
    """float32 master weights, unless the engine keeps those itself beside half-precision ones."""
    if name == "auto":
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        return half if half is not None and manages_master_weights(accelerator) else torch.float32
    return getattr(torch, name)
