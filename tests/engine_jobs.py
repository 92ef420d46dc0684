"""Jobs that take a training step on every rank, under an engine, for comparison with one process."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from easyctx import apply_seq_parallel_monkey_patch, prepare_seq_parallel_inputs, shift_labels
from easyctx.check.float64 import float64_throughout
from easyctx.documents import Documents
from easyctx.engine import make_accelerator
from easyctx.loss import global_sum, num_targets, token_loss_sum
from easyctx.mesh import Mesh
from easyctx.modes import make_mode_mesh
from easyctx.patch import use_own_attention
from easyctx.train import train_step
from easyctx.training.objective import token_loss
from tests.memory_helpers import CHOICES, put_choices
from tests.models import ragged_batch, tiny_model
from tests.parity import relative_error
from tests.reference_attention import use_reference

RATE = 1.0  # plain SGD, so that the change of a weight is its gradient
LENGTH = 53


@dataclass
class Step:
    """An optimizer step: how it is spread, on what model and data."""

    mode: str
    sp_degree: int
    accumulate: int = 1
    dtype: torch.dtype = torch.float64
    max_norm: float = 0.0
    family: str = "llama"
    packed: bool = False
    ring_degree: int | None = None
    offload: bool = False  # FSDP2's parameters on the host
    copies: int = 1  # of the model, each sharded over its own ranks (HSDP)
    loss: str = "full"
    memory: str | None = None  # choices by their name in `memory_helpers`
    sums_each: bool = True  # FSDP2 sums each micro-batch's gradients over the ranks, as in the train loop

    def model(self) -> torch.nn.Module:
        overrides = {"output_router_logits": True} if self.family == "mixtral" else {}
        # As the train loop has it: with a cache a stock model does not look for borders in position ids.
        return tiny_model(self.family, self.dtype, use_cache=False, **overrides)

    def patched_model(self, mesh: Mesh) -> Any:
        model: Any = self.model()
        groups = CHOICES[self.memory](1).head_groups if self.memory else 1
        if self.mode == "data_parallel" and self.memory:
            use_own_attention(model, mesh=mesh, head_groups=groups)
        else:
            apply_seq_parallel_monkey_patch(self.mode, model, mesh=mesh, head_groups=groups)
        if self.memory:
            put_choices(model, self.memory)
        return model

    def data(self, samples: int) -> tuple[torch.Tensor, torch.Tensor, Documents | None]:
        """ids and labels `[samples, S]`, and documents, others in each row."""
        ids, labels = ragged_batch(samples, LENGTH)
        if not self.packed:
            return ids, labels, None
        return ids, labels, Documents(LENGTH, tuple((0, 4 + row, 21, 40 - row) for row in range(samples)))


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int = 2) -> torch.Tensor:
    """transformers' load-balancing loss; its own takes the experts' shares in float32 (see test_moe.py for that)."""
    probabilities = torch.cat(router_logits).softmax(-1)
    num_experts = probabilities.shape[1]
    chosen = torch.nn.functional.one_hot(probabilities.topk(top_k).indices, num_experts).sum(1)
    return num_experts * (chosen.double().mean(0) * probabilities.mean(0)).sum()


Oracle = tuple[dict[str, torch.Tensor], float, float]
_oracles: dict[str, Oracle] = {}  # of this process


def one_process_step(step: Step, samples: int) -> Oracle:
    """The oracle of one SGD step on all samples: changes of its weights, token loss, gradient norm before clipping.

    Made once, however the step is spread over ranks and accumulated batches.
    """
    spread = dict(mode="", sp_degree=0, accumulate=0, ring_degree=None, offload=False, copies=0, loss="", memory=None)
    spread["sums_each"] = True
    key = f"{replace(step, **spread)} {samples}"
    if key not in _oracles:
        _oracles[key] = _one_process_step(step, samples)
    return _oracles[key]


def _one_process_step(step: Step, samples: int) -> Oracle:
    model = use_reference(step.model())
    ids, labels, documents = step.data(samples)
    targets = shift_labels(labels, documents)
    loss, balance = torch.zeros((), dtype=step.dtype), torch.zeros((), dtype=step.dtype)
    for row in range(samples):
        starts = documents.starts[row] if documents else (0,)
        for a, b in zip(starts, (*starts[1:], LENGTH), strict=True):
            outputs = model(ids[row : row + 1, a:b])
            loss = loss + token_loss_sum(outputs.logits, targets[row : row + 1, a:b])
        if step.family == "mixtral":
            assert documents is None
            balance = balance + model.config.router_aux_loss_coef * balance_loss(outputs.router_logits) / samples
    loss = loss / num_targets(targets)
    (loss + balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), step.max_norm or float("inf"))
    torch.optim.SGD(model.parameters(), RATE).step()
    start = dict(step.model().named_parameters())
    return {name: (p - start[name]).detach() for name, p in model.named_parameters()}, loss.item(), float(norm)


def errors(step: Step, got: dict[str, torch.Tensor], samples: int, **found: float) -> dict[str, float]:
    """Against `one_process_step`: the worst change of a weight, relative to the change that was right; the rest."""
    start = dict(step.model().named_parameters())
    want, loss, norm = one_process_step(step, samples)
    wanted = {"loss": loss, "grad_norm": norm}
    worst = max(relative_error(got[name] - start[name], change) for name, change in want.items())
    return {"weights": worst} | {name: abs(value / wanted[name] - 1) for name, value in found.items()}


def fresh_accelerator(**settings: Any) -> Accelerator:
    """An accelerator of this rank, whatever an earlier job of the process made."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state() if state is not PartialState else state._shared_state.clear()
    return make_accelerator(**settings)


def ddp_step(rank: int, world: int, step: Step) -> dict[str, float]:
    """The train loop's own step, through accelerate's DDP, against one process."""
    accelerator = fresh_accelerator(accumulate=step.accumulate)
    mesh = make_mode_mesh(step.mode, step.sp_degree, step.ring_degree)
    samples = mesh.dp_size * step.accumulate
    model: Any = step.patched_model(mesh)
    inner, config = model, model.config
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), RATE))
    ids, labels, documents = step.data(samples)
    mine = []
    for i in range(mesh.dp_rank, samples, mesh.dp_size):
        batch: dict[str, Any] = {"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]}
        if documents is not None:
            batch["documents"] = Documents(LENGTH, documents.starts[i : i + 1])
        mine.append(batch)
    settings = SimpleNamespace(
        parallel_mode=step.mode,
        seq_length=LENGTH,
        pose_length=None,
        gradient_accumulate_every=step.accumulate,
        max_grad_norm=step.max_norm,
        loss=step.loss,
    )
    with float64_throughout():
        loss, norm = train_step(model, optimizer, iter(mine), settings, config, accelerator, mesh)
        return errors(step, dict(inner.named_parameters()), samples, loss=loss, grad_norm=norm)


def fsdp2_step(rank: int, world: int, step: Step) -> dict[str, float]:
    """One step under `fully_shard` over all ranks (accelerate does not turn FSDP2 on without a GPU)."""
    mesh = make_mode_mesh(step.mode, step.sp_degree, step.ring_degree)
    samples = mesh.dp_size * step.accumulate
    model: Any = step.patched_model(mesh)
    settings: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if step.offload else {}
    if step.copies > 1:
        shape = (step.copies, world // step.copies)
        settings["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    # In the units that accelerate makes; where head and embedding are one, they stay in the root's.
    ends = [] if model.config.tie_word_embeddings else [model.model.embed_tokens, [model.model.norm, model.lm_head]]
    for unit in (*model.model.layers, *ends, model):
        fully_shard(unit, **settings)
    ids, labels, documents = step.data(samples)
    targets = shift_labels(labels, documents)
    scale = world / num_targets(targets)  # FSDP2 averages over its ranks
    loss_sum = 0.0
    mine = range(mesh.dp_rank, samples, mesh.dp_size)
    for i in mine:
        model.set_requires_gradient_sync(step.sums_each or i == mine[-1])
        local = prepare_seq_parallel_inputs(
            step.mode,
            ids[i : i + 1],
            None,
            targets[i : i + 1],
            mesh.sp_rank,
            mesh.sp_size,
            "cpu",
            documents=Documents(LENGTH, documents.starts[i : i + 1]) if documents else None,
            ring_degree=mesh.ring_degree,
        )
        wanted = local.pop("local_target_ids")
        inputs = {name.removeprefix("local_"): given for name, given in local.items()}
        with float64_throughout():
            loss, _ = token_loss(model, inputs, wanted, step.loss)
        (loss * scale).backward()
        loss_sum += float(loss)
    torch.optim.SGD(model.parameters(), RATE).step()
    got = {name: p.full_tensor() for name, p in model.named_parameters()}
    with float64_throughout():
        return errors(step, got, samples, loss=global_sum(loss_sum, "cpu") * scale / world)
