"""The train loop: a causal LM on sequences that are sharded over processes.

    accelerate launch --config_file accelerate_configs/zero3_offload.yaml -m easyctx.train \\
        --model meta-llama/Llama-2-7b-hf --dataset data/64k --output-dir output/64k \\
        --seq-length 65536 --rope-theta 5e6 --parallel_mode zigzag_ring_attn

This file is the description of a run and of a step; what a step stands on is in `easyctx/training/`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from easyctx.engine import launched_processes, make_accelerator
from easyctx.inputs import prepare_seq_parallel_inputs
from easyctx.loss import global_sum, num_targets
from easyctx.mesh import Mesh, leave_processes
from easyctx.modes import make_mode_mesh
from easyctx.training.buckets import check_messages
from easyctx.training.card import is_finished
from easyctx.training.checkpoint import make_checkpoints
from easyctx.training.checkpoint_checks import check_can_write, check_checkpoint
from easyctx.training.checkpoint_files import find_checkpoint
from easyctx.training.config import TrainConfig, check_config_values
from easyctx.training.data import counted_tokens, inputs_and_targets, load_rows, make_loader
from easyctx.training.flags import parse_arguments
from easyctx.training.memory import decide_memory, explained_out_of_memory
from easyctx.training.model import load_model, load_model_config
from easyctx.training.objective import token_loss
from easyctx.training.optimizer import clip, learning_rate, make_optimizer, set_learning_rate
from easyctx.training.pose import shard_with_skips
from easyctx.training.progress import TrainingStopped, is_finite
from easyctx.training.report import Reporter, as_float, print_error
from easyctx.training.router import router_objective
from easyctx.training.samples import Samples, load_prompts
from easyctx.training.saving import make_output_dir, save_run
from easyctx.training.validation import Validation, load_eval_rows
from easyctx.training.watch import Watch, message_timeout
from easyctx.training.work import Work


@dataclass(frozen=True)
class Prepared:
    """What a run starts from, checked; the model is loaded next."""

    accelerator: Accelerator
    mesh: Mesh
    model_config: Any
    rows: Any
    eval_rows: Any
    prompts: list[list[int]]
    checkpoint: Path | None


def train(config: TrainConfig, prepared: Prepared) -> int:
    """Run all steps and save the model, or stop with a checkpoint at SIGTERM or SIGINT; the exit status."""
    accelerator, mesh, model_config, rows = prepared.accelerator, prepared.mesh, prepared.model_config, prepared.rows
    model = load_model(config, model_config, accelerator, mesh)
    optimizer = make_optimizer(model, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    make_output_dir(config, accelerator)
    checkpoints = make_checkpoints(config, accelerator, model, optimizer, mesh, rows)
    progress = checkpoints.restore(prepared.checkpoint)
    batches = iter(make_loader(rows, config, mesh, progress.samples))
    reporter = Reporter(config, accelerator, mesh, progress, Work(config, accelerator, model, rows, mesh))
    validation = Validation(config, accelerator, mesh, prepared.eval_rows)
    samples = Samples(config, accelerator, mesh, prepared.prompts, progress.step)
    with Watch(config, progress, mesh) as watch:
        for step in watch.steps():
            rate = learning_rate(config, step)
            set_learning_rate(optimizer, rate)
            with explained_out_of_memory(model):
                loss, grad_norm = train_step(model, optimizer, batches, config, model_config, accelerator, mesh)
            progress.count(reporter.sequences_per_step, loss, grad_norm, config.max_skipped_steps)
            reporter.step(loss, grad_norm, rate)
            reporter.validated(validation.run_if_due(model, progress.step))
            reporter.sampled(samples.run_if_due(model, progress.step))
            checkpoints.save_if_due(progress)
        if watch.stopped_by:
            checkpoints.save_at_stop(progress, watch.stopped_by.name)
    checkpoints.close()
    reporter.close()
    if watch.stopped_by is None:
        save_run(accelerator, model, config, progress, mesh)
    return watch.exit_status()


def train_step(
    model: Any,
    optimizer: Any,
    batches: Iterator[dict[str, Any]],
    config: TrainConfig,
    model_config: Any,
    accelerator: Accelerator,
    mesh: Mesh,
) -> tuple[float, float | None]:
    """One optimizer step over `gradient_accumulate_every` micro-batches: the global mean loss and gradient norm.

    The step is left out where either is not finite. The norm is None where the engine does not tell it.
    """
    micro_batches = [shard(next(batches), config, accelerator, mesh) for _ in range(config.gradient_accumulate_every)]
    valid = sum(num_targets(m["local_target_ids"]) for m in micro_batches)
    # The mean is over all valid tokens of the step, whichever rank and micro-batch they fell to. Engines average
    # gradients over processes, and accelerate over micro-batches, so both averages are undone here.
    total_valid = max(global_sum(valid, accelerator.device), 1.0)
    scale = accelerator.num_processes * config.gradient_accumulate_every / total_valid

    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    mean_loss, grad_norm = 0.0, None
    for micro_batch in micro_batches:
        with accelerator.accumulate(model):
            targets, counted = micro_batch.pop("local_target_ids"), micro_batch.pop("row_lengths")
            inputs = {name.removeprefix("local_"): given for name, given in micro_batch.items()}
            longest = len(targets) * config.seq_length // mesh.sp_size
            loss, outputs = token_loss(model, inputs, targets, config.loss, longest)
            balance = router_objective(outputs, model_config, config.parallel_mode, counted, mesh)
            accelerator.backward(loss * scale + balance)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                grad_norm = as_float(clip(model, config.max_grad_norm, accelerator))
                mean_loss = global_sum(loss_sum, accelerator.device) / total_valid
                # Both numbers are the same on all ranks, so all of them take the step or none does. DeepSpeed has
                # decided likewise by now, and a float16 scaler decides in its step.
                if is_finite(mean_loss, grad_norm) or accelerator.scaler is not None:
                    optimizer.step()
                optimizer.zero_grad()
    return mean_loss, grad_norm


def shard(batch: dict[str, Any], config: TrainConfig, accelerator: Accelerator, mesh: Mesh) -> dict[str, Any]:
    """This rank's part of a batch of whole rows, and `row_lengths`: see `counted_tokens`."""
    input_ids, target_ids, documents = inputs_and_targets(batch, config.seq_length)
    row_lengths = {"row_lengths": counted_tokens(batch, *input_ids.shape)}
    if config.pose_length:
        return row_lengths | shard_with_skips(input_ids, target_ids, config, mesh, accelerator.device)
    place = (mesh.sp_rank, mesh.sp_size, accelerator.device)
    return row_lengths | prepare_seq_parallel_inputs(
        config.parallel_mode, input_ids, None, target_ids, *place, documents=documents, ring_degree=mesh.ring_degree
    )


def prepare(config: TrainConfig) -> Prepared:
    """All that can be checked before the model is loaded: settings, launch, data, configuration, checkpoint.

    Raises:
        ValueError: anything a user can mend, naming both values and the way out.
    """
    sp_degree = check_config_values(config, launched_processes())
    check_can_write(config.output_dir)
    checkpoint = find_checkpoint(config.output_dir, config.resume) if config.resume else None
    accelerator = make_accelerator(
        accumulate=config.gradient_accumulate_every,
        batch_size=config.batch_size,
        max_grad_norm=config.max_grad_norm,
        timeout_seconds=message_timeout(config.hang_timeout),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
    )
    set_seed(config.seed)
    mesh = make_mode_mesh(config.parallel_mode, sp_degree, config.ring_degree)
    model_config = load_model_config(config, sp_degree, accelerator)
    vocab_size = model_config.get_text_config().vocab_size
    rows, eval_rows = load_rows(config, vocab_size), load_eval_rows(config, vocab_size)
    prompts = load_prompts(config, model_config, mesh)
    check_messages(config, mesh, decide_memory(config, model_config, accelerator, mesh))
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, rows)
    return Prepared(accelerator, mesh, model_config, rows, eval_rows, prompts, checkpoint)


def main(argv: list[str] | None = None) -> int:
    config = parse_arguments(argv)
    if config.resume and is_finished(config):
        print(f"easyctx: the run in {config.output_dir} is finished: nothing to resume", flush=True)
        return 0
    prepared = None
    try:
        prepared = prepare(config)
        status = train(config, prepared)
    except (ValueError, TrainingStopped) as error:
        # What is checked before a model is loaded every rank finds alike, and one says so.
        print_error(error, on_all_ranks=prepared is not None and isinstance(error, ValueError))
        return 2 if isinstance(error, ValueError) else 1
    del prepared
    leave_processes()
    return status


if __name__ == "__main__":
    sys.exit(main())
