"""Loading the model that a run trains: RoPE base, dtype, patch, memory."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from easyctx.adapters.folder import base_of, config_source, is_adapter
from easyctx.adapters.inject import check_targets
from easyctx.adapters.prepare import add_adapters
from easyctx.adapters.quantise import quantised
from easyctx.adapters.settings import AdapterSettings, check_adapter_engine
from easyctx.backend import check_backend_config
from easyctx.capability import check_config
from easyctx.engine import leave_unpinned, manages_master_weights
from easyctx.kernel import Workload, get_kernel
from easyctx.liger import check_liger, use_liger_kernels
from easyctx.mesh import Mesh
from easyctx.modes import WHOLE_SEQUENCE, get_mode
from easyctx.patch import apply_seq_parallel_monkey_patch, use_own_attention
from easyctx.training.config import TrainConfig
from easyctx.training.memory import RunMemory, apply_memory, decide_memory, names_kernel, recomputes_without_plan
from easyctx.training.objective import check_loss


def load_model_config(config: TrainConfig, sp_size: int, accelerator: Accelerator) -> Any:
    """The model's configuration, with the new RoPE base and length, after every check that needs only it.

    Raises:
        ValueError: a model whose attention the mode cannot compute exactly, or that has not the layers to adapt; an
            engine that cannot hold quantised weights or step the optimizer.
    """
    settings = AdapterSettings.from_config(config)
    check_adapter_engine(settings, config.optimizer, accelerator)
    try:
        model_config = AutoConfig.from_pretrained(config_source(config.model))
    except OSError as error:
        raise ValueError(f"--model {config.model} could not be loaded: {error}") from error
    check_config(model_config, get_mode(config.parallel_mode), sp_size, config.ring_degree)
    check_backend_config(config.attn_backend, config.parallel_mode, model_config, sp_size, config.ring_degree)
    if config.liger:
        check_liger(model_config)
    set_run_rope(model_config, config)
    if not is_adapter(config.model):  # which says itself what it adapts, also what no flag can
        check_targets(model_config, settings)
    return model_config


def set_run_rope(model_config: Any, config: TrainConfig) -> None:
    """Write the RoPE that a run asks for into a configuration; ValueError where that cannot be."""
    seq_length = max(config.seq_length, config.pose_length or 0)
    if config.rope_factor is not None:
        set_yarn(model_config, config.rope_factor, seq_length)
    set_rope(model_config, config.rope_theta, seq_length)


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


def set_yarn(model_config: Any, factor: float, seq_length: int) -> None:
    """Have RoPE scaled by YaRN (arXiv 2309.00071), `factor` times over the length that the model was made for.

    A model that has YaRN already keeps its original length, so that a later stage's factor counts from there, too.

    Raises:
        ValueError: another kind of RoPE, or a sequence that is longer than the factor reaches.
    """
    rope = model_config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn") or "rope_theta" not in rope:
        raise ValueError(
            f"--rope-scaling yarn cannot be put upon this {model_config.model_type} configuration's RoPE "
            f"({kind if 'rope_theta' in rope else 'one for each kind of layer'}): leave it out, or set "
            "rope_parameters in its config.json"
        )
    original = model_config.max_position_embeddings
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings", original)
    if seq_length > original * factor:
        raise ValueError(
            f"--rope-factor {factor:g} of the {original:,} tokens the model was made for reaches "
            f"{int(original * factor):,}, and a sequence has {seq_length:,}: give at least {seq_length / original:g}"
        )
    # What else such a configuration may hold (attention_factor, beta_fast, …) belongs to the factor it had before.
    scaled = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
    model_config.rope_parameters = {**_unscaled(rope), **scaled}
    model_config.max_position_embeddings = int(original * factor)


def _unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    return {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}


def load_model(config: TrainConfig, model_config: Any, accelerator: Accelerator, mesh: Mesh) -> PreTrainedModel:
    """The model to train, patched for the run's mode and memory. ZeRO-3 shards it while it loads."""
    memory = decide_memory(config, model_config, accelerator, mesh)
    check_kernel(config, model_config, accelerator)
    for line in memory.lines() if memory else ():
        accelerator.print(f"easyctx: {line}")
    if memory and not memory.decision.pins:
        leave_unpinned(accelerator)
    dtype = weight_dtype(config.dtype, accelerator, is_frozen=config.lora_r > 0)
    in_4_bits = quantised(config.quantize, config.double_quant, compute_dtype(dtype, accelerator), accelerator.device)
    model = AutoModelForCausalLM.from_pretrained(base_of(config.model), config=model_config, dtype=dtype, **in_4_bits)
    add_adapters(model, config, accelerator)
    check_loss(model, config.loss)
    patch_model(model, config, memory, accelerator, mesh)
    return model


def check_kernel(config: TrainConfig, model_config: Any, accelerator: Accelerator) -> None:
    """ValueError for a named kernel that this device, dtype or (without sequence parallelism) model cannot use."""
    if config.attn_kernel == "auto":
        return
    if names_kernel(config):
        check_config(model_config, WHOLE_SEQUENCE, 1)
    text = model_config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    dtype = half or weight_dtype(config.dtype, accelerator)
    get_kernel(config.attn_kernel, Workload(accelerator.device, dtype, head_dim))


def patch_model(
    model: PreTrainedModel, config: TrainConfig, memory: RunMemory | None, accelerator: Accelerator, mesh: Mesh
) -> None:
    """Give a model the attention of the run's mode, and have it keep what was decided."""
    if config.liger:
        use_liger_kernels(model)
    groups = memory.decision.choices.head_groups if memory else 1
    if names_kernel(config) or (memory and memory.own_attention):
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


def weight_dtype(name: str, accelerator: Accelerator, is_frozen: bool = False) -> torch.dtype:
    """float32 master weights, unless the engine keeps those itself beside half-precision ones, or none are trained."""
    if name == "auto":
        half = compute_dtype(torch.float32, accelerator)
        return half if is_frozen or manages_master_weights(accelerator) else torch.float32
    return getattr(torch, name)


def compute_dtype(weights: torch.dtype, accelerator: Accelerator) -> torch.dtype:
    """What products are computed in: the half precision that the engine was told of, or the weights' own dtype."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, weights)
