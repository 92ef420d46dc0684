"""A few SGD steps, in one process and as one rank of many: the same loop around two ways to take a loss."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from easyctx.check.batches import Batch, make_batch
from easyctx.check.float64 import float64_throughout
from easyctx.check.model import make_model
from easyctx.check.settings import CheckSettings
from easyctx.documents import Documents
from easyctx.inputs import prepare_seq_parallel_inputs, shift_labels
from easyctx.kernel import KERNELS, Kernel, exact_dtype
from easyctx.loss import global_sum, num_targets, token_loss_sum
from easyctx.mesh import Mesh, make_mesh
from easyctx.patch import apply_seq_parallel_monkey_patch

STEP_SIZE = 0.01  # of an SGD step, in norms of the weights

Progress = Callable[[], None]
Forward = Callable[[nn.Module, Batch], Iterable[tuple[torch.Tensor, int]]]


@dataclass(frozen=True)
class Plan:
    """All that a rank must know. `config` is the small configuration, `attention` the one process's."""

    settings: CheckSettings
    config: Any
    seq_length: int
    attention: str
    device_type: str

    def batch(self, step: int, micro_batch: int, dp_rank: int) -> Batch:
        """One micro-batch of one data-parallel rank."""
        s = self.settings
        return make_batch(
            (step * s.accumulate + micro_batch) * s.dp + dp_rank,
            seed=s.seed,
            length=self.seq_length,
            vocabulary=self.config.vocab_size,
            packed=s.packed,
        )


@dataclass
class Trace:
    """What steps leave: each step's mean loss, and its gradient by parameter (float32 or float64, on the CPU)."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)


def one_process(plan: Plan, dtype: torch.dtype, device: torch.device | str, progress: Progress) -> Trace:
    """The stock model, with its own attention, on whole sequences and all data-parallel ranks' batches.

    Args:
        dtype: of weights and arithmetic. Where it is not the settings' own, the weights start as rounded to that.
    """
    settings = plan.settings
    model = make_model(
        plan.config,
        dtype=dtype,
        seed=settings.seed,
        device=device,
        rounded_to=settings.torch_dtype if dtype != settings.torch_dtype else None,
    )
    model.set_attn_implementation(plan.attention)

    def batches(step: int) -> Iterable[Batch]:
        for micro_batch in range(settings.accumulate):
            for dp_rank in range(settings.dp):
                yield plan.batch(step, micro_batch, dp_rank)
                progress()

    return _steps(model, batches, _whole, settings.steps, lambda tensor: tensor, device)


def one_rank(plan: Plan, rank: int, device: torch.device, progress: Progress) -> Trace:
    """The same steps as one rank of SP x DP: the patched model on this rank's shards. All ranks must call it."""
    settings = plan.settings
    mesh = make_mesh(settings.sp, settings.ring_degree)
    model = make_model(plan.config, dtype=settings.torch_dtype, seed=settings.seed, device=device)
    apply_seq_parallel_monkey_patch(settings.parallel_mode, model, mesh=mesh, kernel=settings.attn_kernel)

    def batches(step: int) -> Iterable[Batch]:
        for micro_batch in range(settings.accumulate):
            yield plan.batch(step, micro_batch, mesh.dp_rank)
            progress()

    def forward(model: nn.Module, batch: Batch) -> Iterable[tuple[torch.Tensor, int]]:
        yield _shard(model, batch, settings, mesh, device)

    def add_up(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    return _steps(model, batches, forward, settings.steps, add_up, device)


def _steps(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    forward: Forward,
    num_steps: int,
    add_up: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device | str,
) -> Trace:
    """SGD steps whose gradients, losses and target counts are summed over micro-batches and, by `add_up`, ranks.

    Weights and sums are kept in float32 (float64 for float64), as an optimizer would.
    """
    parameters = dict(model.named_parameters())
    weights = {name: p.detach().to(exact_dtype(p.dtype), copy=True) for name, p in parameters.items()}
    trace = Trace()
    for step in range(num_steps):
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        loss_sum, valid = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in batches(step):
            for loss, targets in forward(model, batch):
                loss.backward()
                loss_sum += loss.detach()
                valid += targets
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    parameter.grad = None
        total = max(global_sum(valid, device), 1.0)
        gradients = {name: add_up(gradient) / total for name, gradient in sums.items()}
        trace.losses.append(global_sum(loss_sum, device) / total)
        trace.gradients.append({name: gradient.cpu() for name, gradient in gradients.items()})
        rate = STEP_SIZE * _norm(weights) / _norm(gradients)
        with torch.no_grad():
            for name, parameter in parameters.items():
                weights[name] -= rate * gradients[name]
                parameter.copy_(weights[name])
    return trace


def _whole(model: nn.Module, batch: Batch) -> Iterable[tuple[torch.Tensor, int]]:
    """Loss sum and number of targets of whole rows, or of each document alone, which needs no mask to be right."""
    device = next(model.parameters()).device
    if batch.document_ids is None:
        parts = [(batch.input_ids, batch.labels)]
    else:
        parts = [(batch.input_ids[row : row + 1, t], batch.labels[row : row + 1, t]) for row, t in batch.documents()]
    for ids, labels in parts:
        targets = shift_labels(labels)
        with float64_throughout():
            logits = model(input_ids=ids.to(device), use_cache=False).logits
        yield token_loss_sum(logits, targets.to(device)), num_targets(targets)


def _shard(
    model: nn.Module, batch: Batch, settings: CheckSettings, mesh: Mesh, device: torch.device
) -> tuple[torch.Tensor, int]:
    """Loss sum and number of targets of this rank's shard of a batch."""
    documents = None if batch.document_ids is None else Documents.from_ids(batch.document_ids)
    local = prepare_seq_parallel_inputs(
        settings.parallel_mode,
        batch.input_ids,
        None,
        shift_labels(batch.labels, documents),
        mesh.sp_rank,
        mesh.sp_size,
        device,
        documents=documents,
        ring_degree=settings.ring_degree,
    )
    packed = {"documents": local["documents"]} if "documents" in local else {}
    with float64_throughout():
        logits = model(
            input_ids=local["local_input_ids"], position_ids=local["local_position_ids"], use_cache=False, **packed
        ).logits
    return token_loss_sum(logits, local["local_target_ids"]), num_targets(local["local_target_ids"])


def _norm(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([t.double().norm() for t in tensors.values()]).norm()


def count_kernel_calls() -> dict[str, dict[str, int]]:
    """From now on, this process's calls of each kernel by name: {"torch_cpu": {"forward": 8, "backward": 8}}."""
    calls: dict[str, dict[str, int]] = {}

    def counted(name: str, which: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, {"forward": 0, "backward": 0})[which] += 1
            return function(*args, **kwargs)

        return call

    for name, kernel in KERNELS.items():
        for which in ("forward", "backward"):
            setattr(kernel, which, counted(name, which, getattr(kernel, which)))
            packed = f"{which}_packed"  # which ends in calls of the other, unless a kernel has its own
            if getattr(type(kernel), packed) is not getattr(Kernel, packed):
                setattr(kernel, packed, counted(name, which, getattr(kernel, packed)))
    return calls
