"""Refusals: what a trainer would compute of a shard as if it were the whole sequence."""

from collections.abc import Mapping
from typing import Any

# Whose loss, evaluation and batches are replaced knowingly; another trainer's own would be dropped without a word.
KNOWN_TRAINERS = ("Trainer", "SFTTrainer", "_BaseTrainer", "BaseTrainer")
REPLACED = ("compute_loss", "prediction_step", "get_batch_samples", "evaluation_loop")


def check_trainer(trainer_class: type) -> None:
    """ValueError for what is no trainer, or one with a loss or evaluation of its own."""
    for name in REPLACED:
        owner = next((cls for cls in trainer_class.__mro__ if name in vars(cls)), None)
        if owner is None:
            raise ValueError(
                f"{trainer_class.__name__} has no {name}: give transformers' Trainer, TRL's SFTTrainer, or a subclass"
            )
        is_known = owner.__name__ in KNOWN_TRAINERS and owner.__module__.split(".")[0] in ("transformers", "trl")
        if not is_known:
            raise ValueError(
                f"{owner.__name__} has its own {name}, which sequence parallelism would replace: give a subclass of "
                "Trainer or SFTTrainer without it, and write this loss with easyctx's functions (see easyctx/train.py)"
            )


def check_given(given: Mapping[str, Any]) -> None:
    """ValueError for arguments of the trainer's construction that cannot hold on shards."""
    for name, instead in (
        ("compute_loss_func", "the loss is the cross-entropy of the labels"),
        ("model_init", "give the model itself"),
    ):
        if given.get(name) is not None:
            raise ValueError(f"{name} is not supported under sequence parallelism: {instead}")


def check_arguments(args: Any) -> None:
    """ValueError for training arguments that mean something else on a shard, or that have not been proved on one."""
    for name, fine, instead in (
        ("label_smoothing_factor", (0, 0.0), "leave it at 0"),
        ("neftune_noise_alpha", (None,), "its noise depends on the sequence's length: leave it out"),
        ("use_liger_kernel", (False,), "leave it out: the loss is made tile by tile anyhow where logits are large"),
        ("torch_compile", (False,), "leave it out"),
        ("average_tokens_across_devices", (True,), "the loss is the mean over all tokens of a step: leave it at True"),
        ("train_sampling_strategy", ("random", "sequential", "group_by_length"), "use random"),
        ("auto_find_batch_size", (False,), "ranks would not agree on a size: set per_device_train_batch_size"),
        ("loss_type", ("nll", "chunked_nll"), "the loss is the cross-entropy of the labels: use nll"),
    ):
        value = getattr(args, name, fine[0])
        if value not in fine:
            raise ValueError(f"{name} is {value!r}, which is not supported under sequence parallelism: {instead}")
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"accelerator_config has {name}=True, which deals samples out to processes that are to share one: "
                "leave it out"
            )
    spread = getattr(args, "parallelism_config", None)
    degrees = {name: getattr(spread, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    if any((degree or 1) > 1 for degree in degrees.values()):
        raise ValueError(
            f"parallelism_config has {degrees}, but the sequence is to be shared by easyctx: set them to 1"
        )


def check_model(model: Any) -> None:
    """ValueError for a mixture of experts that is to balance its experts: its router loss is not sharded here."""
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__}'s configuration asks for a router loss (output_router_logits), which is not "
            "supported here under sequence parallelism: set it to False (SFTConfig: router_aux_loss_coef=0.0), or "
            "train with `python -m easyctx.train`, which has it"
        )
