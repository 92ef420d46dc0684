"""Sequence parallelism in transformers' `Trainer` and TRL's `SFTTrainer`.

from easyctx.trainer import sequence_parallel

trainer = sequence_parallel(Trainer, mode="zigzag_ring_attn", sp_degree=8)(model=model, args=args, …)
trainer.train()
"""

from easyctx.trainer.mixin import SequenceParallelMixin, sequence_parallel

__all__ = ["SequenceParallelMixin", "sequence_parallel"]
