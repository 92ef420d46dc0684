"""Liger's kernels for what lies between a model's matrices: norms, SwiGLU, rotary embeddings."""

import importlib.util
import inspect
from typing import Any

import torch

from easyctx.memory.shape import MemoryShape


def check_liger(model_config: Any) -> None:
    """ValueError if `--liger` cannot be honoured: no package, no GPU, a model or layers that Liger does not know."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError('--liger needs the package liger-kernel: pip install "easyctx[liger]", or leave --liger out')
    if not torch.cuda.is_available():
        raise ValueError("--liger: its kernels run on GPUs only, and there is none here: leave --liger out")
    known = _functions()
    if model_config.model_type not in known:
        raise ValueError(
            f"--liger has nothing for {model_config.model_type} models, only for {', '.join(sorted(known))}: "
            "leave it out"
        )
    if dense := MemoryShape.from_config(model_config).dense_layers:
        raise ValueError(
            f"--liger expects experts in every layer of a {model_config.model_type} model, and {len(dense)} of this "
            f"one have a dense MLP (layers {', '.join(map(str, dense))}): leave --liger out"
        )


def use_liger_kernels(model: Any) -> None:
    """Have a transformers model compute its norms, SwiGLU and RoPE with Liger; its loss and outputs stay its own.

    Of RoPE Liger replaces the function that all models of the architecture call.
    """
    apply = _functions()[model.config.model_type]
    # Its fused losses would take the place of ours, which knows the sequence's shards.
    wanted = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
    wanted |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    takes = inspect.signature(apply).parameters
    apply(model=model, **{name: value for name, value in wanted.items() if name in takes})


def _functions() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN
