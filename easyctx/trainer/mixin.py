"""What a trainer does otherwise when processes share sequences: samples, loss, evaluation."""

import inspect
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from accelerate import DistributedType

from easyctx.inputs import gather_sequence
from easyctx.loss import num_targets
from easyctx.mesh import Mesh
from easyctx.modes import get_mode, make_mode_mesh
from easyctx.patch import apply_seq_parallel_monkey_patch
from easyctx.trainer.batch import WholeBatch, read_batch, shard_batch
from easyctx.trainer.checks import check_arguments, check_given, check_model, check_trainer
from easyctx.trainer.figures import record_figures
from easyctx.trainer.samples import count_targets, deal_by_sequence, gather_samples, sum_over_sequence
from easyctx.training.objective import token_loss

DDP_TYPES = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class SequenceParallelMixin(Base):
    """In front of `Trainer` or `SFTTrainer`; made by `sequence_parallel`, which settles what is below."""

    sp_mode: ClassVar[str]
    sp_degree: ClassVar[int | None] = None
    sp_ring_degree: ClassVar[int | None] = None
    sp_kernel: ClassVar[str] = "auto"
    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    sp_mesh: Mesh

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        check_given(given)
        if given.get("args") is not None:
            self._check_and_place(given["args"])  # before SFTTrainer loads a model by its name
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # transformers before 5.19 has only this for loss_is_scaled_for_ga
        inner: Any = self.model
        check_model(inner)
        apply_seq_parallel_monkey_patch(self.sp_mode, inner, mesh=self.sp_mesh, kernel=self.sp_kernel)
        self._announce()

    def _check_and_place(self, args: Any) -> None:
        check_arguments(args)
        args.device  # noqa: B018  the first look at it starts torch.distributed
        self.sp_mesh = make_mode_mesh(self.sp_mode, self.sp_degree, self.sp_ring_degree)

    def create_accelerator_and_postprocess(self) -> None:
        self._check_and_place(self.args)
        super().create_accelerator_and_postprocess()
        deal_by_sequence(self.accelerator, self.sp_mesh)

    def _announce(self) -> None:
        if self.args.process_index == 0:
            batch, accumulate = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
            print(
                f"easyctx: {self.sp_mode}, {self.sp_mesh}; a step takes {batch * accumulate * self.sp_mesh.dp_size} "
                f"sequences ({batch} a batch x {accumulate} accumulated x DP {self.sp_mesh.dp_size})",
                flush=True,
            )

    def get_total_train_batch_size(self, args: Any) -> int:
        """Sequences to a step."""
        return super().get_total_train_batch_size(args) // self.sp_mesh.sp_size

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """A step's micro-batches, and how many of all ranks' tokens in them have a loss."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, count_targets(batches, self.sp_mesh, device) if batches else None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This rank's share of the mean over the step's tokens, times the ranks that the engine will average over."""
        if num_items_in_batch is None:
            num_items_in_batch = count_targets([inputs], self.sp_mesh, self.args.device)
        loss_sum, _, outputs = self._loss_of_shard(model, read_batch(inputs))
        loss = loss_sum * (self.accelerator.num_processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss_of_shard(
        self, model: Any, whole: WholeBatch, kind: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """The loss summed over this rank's targets, the targets, and the model's outputs."""
        inputs, targets = shard_batch(whole, self.sp_mode, self.sp_mesh, self.args.device)
        assert targets is not None
        loss_sum, outputs = token_loss(model, inputs, targets, kind)
        has_logits = outputs.logits.shape[:2] == targets.shape
        record_figures(self, outputs.logits if has_logits else None, targets, whole.tokens, self.sp_mesh)
        return loss_sum, targets, outputs

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Mean loss of this data-parallel rank's batch; logits and labels of whole sequences if they are asked for."""
        inputs = self._prepare_inputs(inputs)
        whole = read_batch(inputs)
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if whole.targets is None:
                outputs = model(**shard_batch(whole, self.sp_mode, self.sp_mesh, self.args.device)[0])
            else:
                kind = "auto" if prediction_loss_only else "full"
                loss_sum, targets, outputs = self._loss_of_shard(model, whole, kind)
                sums = torch.stack([loss_sum.double(), loss_sum.new_tensor(num_targets(targets)).double()])
                total, number = sum_over_sequence(sums, self.sp_mesh)
                loss = (total / number.clamp(min=1)).to(loss_sum.dtype)
        if prediction_loss_only:
            return loss, None, None
        length = whole.input_ids.shape[1]
        return loss, gather_sequence(self.sp_mode, outputs.logits, self.sp_mesh, length), inputs.get("labels")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer's own gathers over all processes, and would take a sequence for as many as it has ranks.
        self.gather_function = lambda local: gather_samples(self.accelerator, self.sp_mesh, local)
        outputs = super().evaluation_loop(*args, **kwargs)
        is_bare, model = self.model_wrapped is self.model, cast(Any, self.model)
        if is_bare and self.accelerator.distributed_type in DDP_TYPES:
            # accelerate takes a model that was prepared for evaluation as prepared, and a training that begins
            # afterwards would go without DDP.
            model._is_accelerate_prepared = False
        return outputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """This rank's share; Trainer adds up all ranks'."""
        return super().floating_point_ops(inputs) // self.sp_mesh.sp_size

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self.sp_mesh.sp_size


def sequence_parallel(
    trainer_class: type,
    mode: str = "zigzag_ring_attn",
    *,
    sp_degree: int | None = None,
    ring_degree: int | None = None,
    kernel: str = "auto",
) -> Any:
    """The trainer class with sequences shared by `sp_degree` processes each; construct and use it as ever.

    Loss and gradients are those of one process on the whole sequences: a mean over all tokens with a label, whichever
    rank and accumulated batch they fall to. Batch sizes are per data-parallel rank (processes / `sp_degree`). Rows
    may be padded on the right, or packed, with position ids that begin again at 0 with every document.

    Args:
        trainer_class: transformers' `Trainer`, TRL's `SFTTrainer`, or a subclass that leaves loss and evaluation alone.
        mode: a sequence-parallel mode of `easyctx.modes.MODES`.
        sp_degree: processes to a sequence; default: all.
        ring_degree: of `usp_attn`.
        kernel: one of `easyctx.kernel.KERNEL_CHOICES`.

    Raises:
        ValueError: here for unknown modes and trainers with a loss of their own; at construction for settings that
            would be wrong on a shard, and for degrees that do not divide the processes.
    """
    if not get_mode(mode).is_sequence_parallel:
        raise ValueError(f"{mode} shares no sequences: use {trainer_class.__name__} itself, or zigzag_ring_attn")
    check_trainer(trainer_class)
    settings = {"sp_mode": mode, "sp_degree": sp_degree, "sp_ring_degree": ring_degree, "sp_kernel": kernel}
    return type(f"SequenceParallel{trainer_class.__name__}", (SequenceParallelMixin, trainer_class), settings)
