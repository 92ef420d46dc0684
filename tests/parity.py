"""Jobs that run on every rank and compare a sharded model with one process on the whole sequence."""

import torch
import torch.distributed as dist

from easyctx import (
    apply_seq_parallel_monkey_patch,
    gather_sequence,
    make_mesh,
    prepare_seq_parallel_inputs,
    shift_labels,
)
from easyctx.loss import num_targets, token_loss_sum
from tests.models import ragged_batch, tiny_model


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def worst_gradient_error(got: torch.nn.Module, want: torch.nn.Module) -> float:
    """The largest relative error over parameters. A gradient that is zero but for rounding (of q and k where no
    token with a loss has a choice of keys, say) is measured against 1e-4 of the whole gradient's norm."""
    wanted = {name: p.grad.double() for name, p in want.named_parameters()}
    floor = 1e-4 * torch.stack([g.norm() for g in wanted.values()]).norm()
    return max(
        float((p.grad.double() - wanted[name]).norm() / wanted[name].norm().clamp_min(floor))
        for name, p in got.named_parameters()
    )


def model_parity(
    rank: int,
    world: int,
    mode: str,
    family: str,
    length: int,
    batch: int,
    dtype: torch.dtype,
    overrides: dict,
    by: str,
) -> dict[str, float]:
    """Loss, logits and gradients of one batch: `mode` over all ranks against the stock model on one."""
    ids, labels = ragged_batch(batch, length)
    targets = shift_labels(labels)
    stock, sharded = tiny_model(family, dtype, **overrides), tiny_model(family, dtype, **overrides)
    want_logits = stock(ids).logits
    want = token_loss_sum(want_logits, targets) / num_targets(targets)
    want.backward()

    mesh = make_mesh()
    with apply_seq_parallel_monkey_patch(mode, sharded if by == "instance" else family):
        local = prepare_seq_parallel_inputs(mode, ids, None, targets, mesh.sp_rank, mesh.sp_size, "cpu")
        logits = sharded(local["local_input_ids"], position_ids=local["local_position_ids"]).logits
        loss = token_loss_sum(logits, local["local_target_ids"]) / num_targets(targets)
        loss.backward()
        for parameter in sharded.parameters():
            dist.all_reduce(parameter.grad)
        total = loss.detach().clone()
        dist.all_reduce(total)
    return {
        "loss": relative_error(total, want),
        "logits": relative_error(gather_sequence(mode, logits, mesh, length), want_logits),
        "gradients": worst_gradient_error(sharded, stock),
    }
