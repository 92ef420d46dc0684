"""The engine under a run: one `accelerate.Accelerator`, made alike for training and evals.

DDP, DeepSpeed ZeRO-3 and FSDP2 come from the accelerate configuration; what is settled here is what accelerate
leaves to its caller: gloo where there is no GPU, and one source for settings that DeepSpeed also takes.
"""

import os
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed.fsdp import CPUOffloadPolicy


def launched_processes() -> int:
    """Processes of this launch as `accelerate launch` and `torchrun` tell them (1 under plain python)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch() -> None:
    """Refuse, with a ValueError, a launch that cannot work on this machine."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local:
        raise ValueError(
            f"{local} processes were launched on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}: "
            f"launch with --num_processes {gpus}, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    if gpus == 0 and _is_set("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "FSDP2 through accelerate needs GPUs and 0 were found: on a CPU take accelerate_configs/cpu.yaml, or "
            "zero3_offload.yaml where DeepSpeed is installed"
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise ValueError(
                "the accelerate configuration asks for DeepSpeed, which is not installed: "
                "pip install 'easyctx[deepspeed]'"
            ) from None


def make_accelerator(
    *,
    accumulate: int = 1,
    batch_size: int = 1,
    max_grad_norm: float = 1.0,
    timeout_seconds: float | None = None,
    **kwargs: Any,
) -> Accelerator:
    """The run's accelerator, on one process or many, with or without GPUs.

    Args:
        accumulate: micro-batches to an optimizer step.
        batch_size: sequences to a micro-batch; DeepSpeed wants to know.
        max_grad_norm: DeepSpeed clips itself, to this; elsewhere the train loop does.
        timeout_seconds: for which a message may be under way; None for torch's default.
        kwargs: further arguments of `Accelerator` (trackers, project folder).

    Raises:
        ValueError: more processes than GPUs, FSDP2 without a GPU, DeepSpeed that is not installed.
    """
    check_launch()
    on_cpu = torch.cuda.device_count() == 0
    if not on_cpu:
        use_expandable_segments(os.environ)
    processes: dict[str, Any] = {}
    if timeout_seconds is not None:
        processes["timeout"] = timedelta(seconds=timeout_seconds)
    if on_cpu and _is_set("ACCELERATE_USE_DEEPSPEED"):
        # accelerate refuses DeepSpeed together with cpu=True; the backend alone makes it run there.
        processes["backend"] = "gloo"
        on_cpu = False
    accelerator = Accelerator(
        cpu=on_cpu,
        kwargs_handlers=[InitProcessGroupKwargs(**processes)] if processes else None,
        # The loop says itself which micro-batch ends a step, so the end of an epoch must not. FSDP2 sums each
        # micro-batch's gradients over the ranks: until it does, every rank has all of them whole.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulate, sync_with_dataloader=False, sync_each_batch=_is_set("ACCELERATE_USE_FSDP")
        ),
        **kwargs,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        refuse_second_source(settings)
        settings["train_micro_batch_size_per_gpu"] = batch_size
        settings["gradient_accumulation_steps"] = accumulate
        settings["gradient_clipping"] = max_grad_norm
        settings.pop("train_batch_size", None)
    return accelerator


def use_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Have PyTorch's allocator grow its segments in place, unless a user set it up otherwise.

    Without it, tensors of other lengths than before leave fragments that nothing fits into. PyTorch reads this as the
    first memory of the GPU is asked for.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in environment for name in names):
        environment[names[0]] = "expandable_segments:True"


def refuse_second_source(settings: dict[str, Any]) -> None:
    """ValueError if a DeepSpeed configuration sets what the command line sets (the learning rate above all)."""
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ValueError(
                f"the DeepSpeed configuration has a section {section!r} ({settings[section]}), but the optimizer, "
                "its learning rate and its schedule come from the command line: remove the section"
            )


def offloads_to_host(plugin: Any) -> bool:
    """Whether accelerate's FSDP plugin keeps parameters in host memory."""
    policy = plugin.cpu_offload  # without offloading not None, but one that does nothing
    return isinstance(policy, CPUOffloadPolicy) or bool(getattr(policy, "offload_params", False))


def leave_unpinned(accelerator: Accelerator) -> None:
    """Have FSDP2 keep what it offloads in memory that is not pinned; to be said before a model is prepared."""
    accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


def engine_name(accelerator: Accelerator) -> str:
    """What runs the weights, in a few words."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        return f"DeepSpeed ZeRO-{plugin.zero_stage}{_offloads(plugin.deepspeed_config)}"
    if kind == DistributedType.FSDP:
        plugin, spread = accelerator.state.fsdp_plugin, accelerator.parallelism_config
        copies = getattr(spread, "dp_replicate_size", 1)
        hybrid = f" in {copies} copies (HSDP)" if copies > 1 else ""
        return f"FSDP{plugin.fsdp_version}{hybrid}{' with CPU offload' if offloads_to_host(plugin) else ''}"
    return {DistributedType.NO: "one process"}.get(kind, "DDP")


def manages_master_weights(accelerator: Accelerator) -> bool:
    """Whether the engine itself keeps float32 copies of half-precision weights for the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision != "no"


def _offloads(settings: dict[str, Any]) -> str:
    zero = settings.get("zero_optimization", {})
    parts = [
        what
        for what, key in (("parameters", "offload_param"), ("optimizer", "offload_optimizer"))
        if (zero.get(key) or {}).get("device", "none") != "none"
    ]
    return f", {' and '.join(parts)} offloaded" if parts else ""


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
