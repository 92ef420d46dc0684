"""The memory of a run: from its flags, engine, model and machine to a decision, and the decision into the model."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType

from easyctx.backend import OWN
from easyctx.capability import FAMILIES, check_config
from easyctx.engine import manages_master_weights, offloads_to_host
from easyctx.head import inner_model
from easyctx.kernel import Workload, get_kernel
from easyctx.kernel.flash4 import keeps_sums
from easyctx.memory.adapters import shape_of_run
from easyctx.memory.budget import GIB, MemoryShape, Setting, Widths, host_tensors
from easyctx.memory.describe import UNLIMITED, describe, explained, gib, why_not
from easyctx.memory.host import usable_host_memory
from easyctx.memory.install import apply_choices
from easyctx.memory.policy import Budget, Decision, DoesNotFit, Wishes, decide, longest_that_fits, usable_gpu_memory
from easyctx.memory.pool import BLOCK, HostPool
from easyctx.memory.spill import Spill
from easyctx.memory.working_set import BY_BLOCKS
from easyctx.mesh import Mesh
from easyctx.modes import WHOLE_SEQUENCE, get_mode
from easyctx.schedule.groups import check_head_groups
from easyctx.training.config import TrainConfig
from easyctx.training.objective import SMALL_LOGITS
from easyctx.training.wishes import wishes_of


@dataclass(frozen=True)
class RunMemory:
    """What a run decided. own_attention: whether `data_parallel` runs our operator in place of the model's."""

    shape: MemoryShape
    setting: Setting
    budget: Budget
    decision: Decision
    own_attention: bool

    def lines(self) -> list[str]:
        return describe(self.decision, self.budget)


@dataclass(frozen=True)
class Question:
    """What the policy is asked: everything but the length. own_attention: as of `RunMemory`."""

    shape: MemoryShape
    setting: Setting
    budget: Budget
    wishes: Wishes
    own_attention: bool


def decide_memory(config: TrainConfig, model_config: Any, accelerator: Accelerator, mesh: Mesh) -> RunMemory | None:
    """What this run keeps, and where; None for a model that is left as it is. The same on all ranks.

    Raises:
        ValueError: a length that does not fit, with the longest that does; flags that this model, mode or engine
            cannot honour.
    """
    asked = _question(config, model_config, accelerator, mesh)
    if asked is None:
        return None
    try:
        decision = decide(asked.shape, asked.setting, asked.budget, asked.wishes, config.seq_length)
    except DoesNotFit as error:
        longest = _longest(asked, config, mesh)
        raise ValueError(
            why_not(error.best, asked.budget, asked.setting.tokens, longest, config.seq_length, mesh.sp_size)
        ) from None
    setting = replace(asked.setting, pins=decision.pins)
    return RunMemory(asked.shape, setting, asked.budget, decision, asked.own_attention)


def longest_sequence(config: TrainConfig, model_config: Any, accelerator: Accelerator, mesh: Mesh) -> int | None:
    """Tokens of the longest sequence that fits, 0 if none does; None for a model whose memory is not planned."""
    asked = _question(config, model_config, accelerator, mesh)
    return None if asked is None else _longest(asked, config, mesh)


def _longest(asked: Question, config: TrainConfig, mesh: Mesh) -> int:
    tokens = longest_that_fits(asked.shape, asked.setting, asked.budget, asked.wishes)
    return tokens // config.batch_size * mesh.sp_size


def _question(config: TrainConfig, model_config: Any, accelerator: Accelerator, mesh: Mesh) -> Question | None:
    wishes, device = wishes_of(config), accelerator.device
    if config.lora_dropout:  # its random numbers are made again with a kept input, and only so
        wishes = replace(wishes, every=1, mlp_tile=0)
    if config.memory == "off" or (device.type == "cpu" and wishes.are_none):
        return None
    if not _is_known(model_config):
        if replace(wishes, attention=None, everything=None) != Wishes() or wishes.attention in ("gpu", "host"):
            raise ValueError(
                f"memory is planned for the families {', '.join(FAMILIES)}, and this model is {_family(model_config)}: "
                "of the flags about memory it has --recompute all and --recompute none"
            )
        return None
    shape = shape_of_run(config, model_config)
    own = _runs_own_attention(config, model_config, device, wishes)
    is_sharded = get_mode(config.parallel_mode).is_sequence_parallel
    if config.attn_backend != OWN or not (own or is_sharded):
        wishes = _without_own_attention(wishes)
    setting = _setting(config, model_config, shape, accelerator, mesh)
    if wishes.head_groups is not None:
        check_head_groups(wishes.head_groups, shape.kv_heads, setting.ulysses)
    if wishes.every is not None and not 1 <= wishes.every <= shape.num_layers:
        raise ValueError(f"--checkpoint-every is {wishes.every}, outside 1 .. {shape.num_layers} layers")
    return Question(shape, setting, budget_now(config, device), wishes, own)


def apply_memory(model: Any, memory: RunMemory | None, device: torch.device) -> None:
    """Have the model keep what was decided, in place of an earlier decision; allocates the host pool, once."""
    if (earlier := getattr(model, "easyctx_plan", None)) is not None:
        earlier.remove()
    if memory is None:
        return
    choices = memory.decision.choices
    model.easyctx_memory = memory
    sizes = host_tensors(memory.shape, memory.setting, choices)
    spill = None
    if sizes:
        # As large as the smallest tensor, so that little of a block is wasted.
        block = min(BLOCK, max(4096, 1 << (min(sizes).bit_length() - 1)))
        pin = device.type == "cuda"
        if pin and os.environ.get("RANK", "0") == "0":  # half a second for each GiB
            print(f"easyctx: memory: pinning {gib(sum(sizes))} GiB of host memory for each rank …", flush=True)
        pool = HostPool(HostPool.bytes_for(sizes, block), pin, block)
        spill = Spill(pool, device)
    plan = model.easyctx_plan = apply_choices(model, choices, spill)
    if plan.untiled and os.environ.get("RANK", "0") == "0":
        names = ", ".join(sorted(set(plan.untiled)))
        print(f"easyctx: memory: {len(plan.untiled)} layers' MLPs are left whole: {names}", flush=True)


def recomputes_without_plan(config: TrainConfig, model_config: Any, device: torch.device) -> bool:
    """Whether a model of a family that is not planned for gets transformers' own checkpoints, one to each layer."""
    if config.memory == "off" or _is_known(model_config):
        return False
    return config.recompute in ("all", "keep-attention") or (config.recompute == "auto" and device.type == "cuda")


def _is_known(model_config: Any) -> bool:
    return _family(model_config) in FAMILIES


def _family(model_config: Any) -> str:
    return model_config.get_text_config(decoder=True).model_type


def explained_out_of_memory(model: Any) -> AbstractContextManager[None]:
    """Within it, running out of memory says what had been predicted for this model and which flag to turn."""
    memory: RunMemory | None = getattr(inner_model(model), "easyctx_memory", None)
    return explained(memory.decision, memory.budget) if memory else nullcontext()


def _runs_own_attention(config: TrainConfig, model_config: Any, device: torch.device, wishes: Wishes) -> bool:
    """Whether data parallelism takes our attention: on a GPU where it can, elsewhere where a flag needs it."""
    if get_mode(config.parallel_mode).is_sequence_parallel:
        return False
    asked = names_kernel(config) or wishes.attention in ("kept", "gpu", "host") or (wishes.head_groups or 1) > 1
    if not (asked or device.type == "cuda"):
        return False
    try:
        check_config(model_config, WHOLE_SEQUENCE, 1)
    except ValueError:
        if asked:
            raise
        return False
    return True


def names_kernel(config: TrainConfig) -> bool:
    """Whether data parallelism is to run one of our kernels, whatever the memory."""
    return not get_mode(config.parallel_mode).is_sequence_parallel and config.attn_kernel != "auto"


def _without_own_attention(wishes: Wishes) -> Wishes:
    """The model's own attention, or another package's, gives nothing to keep, and knows no groups."""
    if wishes.everything:
        return replace(wishes, head_groups=1)
    return replace(wishes, attention="recompute", head_groups=1)


def _setting(
    config: TrainConfig, model_config: Any, shape: MemoryShape, accelerator: Accelerator, mesh: Mesh
) -> Setting:
    mode, device = get_mode(config.parallel_mode), accelerator.device
    ring, ulysses = mode.axes(mesh) if mode.is_sequence_parallel else (Mesh().sp, Mesh().sp)
    length = config.seq_length
    if mode.is_sequence_parallel:
        length += -length % mode.shard_layout(mesh.sp_size, mesh.ring_degree).multiple(mesh.sp_size)
    engine = memory_engine(accelerator)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    is_narrow = manages_master_weights(accelerator) or shape.adapters is not None
    weights = half if is_narrow and half else torch.float32
    weights = weights if config.dtype == "auto" else getattr(torch, config.dtype)
    compute = half or weights
    # Sharding engines compute in half precision throughout; autocast leaves the residual stream as the weights are.
    stream = compute if engine.startswith(("fsdp2", "zero3")) else weights
    text = model_config.get_text_config(decoder=True)
    work = Workload(
        device,
        compute,
        shape.head_dim,
        windowed=bool(getattr(text, "sliding_window", None)),
        softcapped=bool(getattr(text, "attn_logit_softcapping", None)),
    )
    small = length // mesh.sp_size * config.batch_size * shape.vocab <= SMALL_LOGITS
    return Setting(
        tokens=length // mesh.sp_size * config.batch_size,
        engine=engine,
        ranks=accelerator.num_processes,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        ring=ring.size,
        ulysses=ulysses.size,
        kernel=_name_of_kernel(config, work),
        widths=Widths(compute.itemsize, stream.itemsize),
        weight_bytes=weights.itemsize,
        optimizer=config.optimizer,
        accumulates=config.gradient_accumulate_every > 1,
        process=Setting.process if device.type == "cuda" else 0,  # on a CPU it is there already
        tiled_loss=config.loss == "tiled" or (config.loss == "auto" and not small),
        fused_loss=device.type == "cuda",
    )


def _name_of_kernel(config: TrainConfig, work: Workload) -> str:
    """As `easyctx.memory.working_set` knows it."""
    name = get_kernel(config.attn_kernel, work).name
    return BY_BLOCKS if name == "flash4" and not keeps_sums(work.head_dim) else name


def memory_engine(accelerator: Accelerator) -> str:
    """The engine by its name in `easyctx.memory.engines`."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        return "zero3_offload" if offloads else "zero3"
    if kind == DistributedType.FSDP:
        return "fsdp2_offload" if offloads_to_host(accelerator.state.fsdp_plugin) else "fsdp2"
    # DeepSpeed's lower stages shard less than stage 3; to count them as DDP is on the safe side.
    return "one process" if kind == DistributedType.NO else "ddp"


def budget_now(config: TrainConfig, device: torch.device) -> Budget:
    """What may be used of a GPU and of the machine: the least of all ranks, so that all decide alike."""
    gpu, host = UNLIMITED, usable_host_memory()
    if device.type == "cuda":
        gpu = usable_gpu_memory(torch.cuda.mem_get_info(device)[0])
    if dist.is_initialized():
        least = torch.tensor([gpu, host], dtype=torch.int64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        gpu, host = least.tolist()
    # What processes hold already is part of both the prediction and of what is no longer available.
    return Budget(
        gpu if config.gpu_memory is None else int(config.gpu_memory * GIB),
        host if config.host_memory is None else int(config.host_memory * GIB),
    )
