"""Jobs that take a training step on every rank, under an engine, for comparison with one process."""

from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from easyctx import apply_seq_parallel_monkey_patch, make_mesh, prepare_seq_parallel_inputs, shift_labels
from easyctx.engine import make_accelerator
from easyctx.loss import global_sum, num_targets, token_loss_sum
from easyctx.train import train_step
from tests.models import ragged_batch, tiny_model
from tests.parity import relative_error

RATE = 1.0  # plain SGD, so that the change of a weight is its gradient


def one_process_step(
    length: int, samples: int, dtype: torch.dtype, max_norm: float
) -> tuple[torch.nn.Module, float, float]:
    """The stock model after one SGD step on all samples at once; its loss and gradient norm before clipping."""
    model = tiny_model("llama", dtype)
    ids, labels = ragged_batch(samples, length)
    targets = shift_labels(labels)
    loss = token_loss_sum(model(ids).logits, targets) / num_targets(targets)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    torch.optim.SGD(model.parameters(), RATE).step()
    return model, float(loss), float(norm)


def weight_error(
    got: dict[str, torch.Tensor], length: int, samples: int, dtype: torch.dtype, max_norm: float = 0.0
) -> dict[str, float]:
    """Errors against `one_process_step`: the worst change of a weight, relative to the change that was right."""
    start = dict(tiny_model("llama", dtype).named_parameters())
    want, loss, norm = one_process_step(length, samples, dtype, max_norm)
    errors = [relative_error(got[name] - start[name], p - start[name]) for name, p in want.named_parameters()]
    return {"weights": max(errors), "loss": loss, "grad_norm": norm}


def ddp_step(
    rank: int, world: int, mode: str, sp_degree: int, accumulate: int, dtype: torch.dtype, max_norm: float = 0.0
) -> dict[str, float]:
    """The train loop's own step, through accelerate's DDP, against one process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state() if state is not PartialState else state._shared_state.clear()
    accelerator = make_accelerator(accumulate=accumulate)
    mesh = make_mesh(sp_degree)
    length, samples = 53, mesh.dp_size * accumulate
    model = tiny_model("llama", dtype)
    apply_seq_parallel_monkey_patch(mode, model, mesh=mesh)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), RATE))
    ids, labels = ragged_batch(samples, length)
    mine = [
        {"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(mesh.dp_rank, samples, mesh.dp_size)
    ]
    config = SimpleNamespace(
        parallel_mode=mode, seq_length=length, gradient_accumulate_every=accumulate, max_grad_norm=max_norm
    )
    loss, norm = train_step(model, optimizer, iter(mine), config, accelerator, mesh)
    found = weight_error(dict(model.module.named_parameters()), length, samples, dtype, max_norm)
    return {
        "weights": found["weights"],
        "loss": abs(loss / found["loss"] - 1),
        "grad_norm": abs(norm / found["grad_norm"] - 1),
    }


def fsdp2_step(
    rank: int, world: int, mode: str, sp_degree: int, accumulate: int, dtype: torch.dtype, offload: bool
) -> dict[str, float]:
    """One step under `fully_shard` over all ranks (accelerate does not turn FSDP2 on without a GPU)."""
    mesh = make_mesh(sp_degree)
    length, samples = 53, mesh.dp_size * accumulate
    model = tiny_model("llama", dtype)
    apply_seq_parallel_monkey_patch(mode, model, mesh=mesh)
    settings = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    ids, labels = ragged_batch(samples, length)
    targets = shift_labels(labels)
    scale = world / num_targets(targets)  # FSDP2 averages over its ranks
    loss_sum = 0.0
    mine = range(mesh.dp_rank, samples, mesh.dp_size)
    for i in mine:
        model.set_requires_gradient_sync(i == mine[-1])
        local = prepare_seq_parallel_inputs(
            mode, ids[i : i + 1], None, targets[i : i + 1], mesh.sp_rank, mesh.sp_size, "cpu"
        )
        logits = model(input_ids=local["local_input_ids"], position_ids=local["local_position_ids"]).logits
        loss = token_loss_sum(logits, local["local_target_ids"])
        (loss * scale).backward()
        loss_sum += float(loss)
    torch.optim.SGD(model.parameters(), RATE).step()
    found = weight_error({n: p.full_tensor() for n, p in model.named_parameters()}, length, samples, dtype)
    return {
        "weights": found["weights"],
        "loss": abs(global_sum(loss_sum, "cpu") * scale / world / found["loss"] - 1),
    }
