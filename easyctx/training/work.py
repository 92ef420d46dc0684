"""How much there is to do in a step: tokens, and the model's FLOPs."""

from functools import lru_cache
from typing import Any

import numpy as np
from accelerate import Accelerator

from easyctx.data.load import row_lengths
from easyctx.data.packed import BORDER_COLUMNS
from easyctx.mesh import Mesh
from easyctx.training.buckets import Buckets
from easyctx.training.config import TrainConfig
from easyctx.training.flops import sequence_flops
from easyctx.training.order import GlobalOrder


class Work:
    """Of rows of one length every step has as much; of others (`--buckets`) as much as its rows, without their padding.

    All that is needed every rank knows: which rows a step sees follows from its number.

    Args:
        model: also wrapped by an engine.
        rows: of the dataset.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, model: Any, rows: Any, mesh: Mesh) -> None:
        self.config = config
        self.sequences_per_step = config.batch_size * mesh.dp_size * config.gradient_accumulate_every
        inner = accelerator.unwrap_model(model)
        self._flops = lru_cache(maxsize=1024)(lambda length: sequence_flops(inner, length))
        # Documents of packed rows see less than the row, each row's another amount.
        self._is_packed = not config.ignore_borders and bool(set(BORDER_COLUMNS) & set(rows.column_names))
        self._row_lengths: np.ndarray | None = None
        self._order = GlobalOrder(len(rows), config.seed, 1, 0, 1)
        self.about_rows = f"{config.seq_length:,} tokens a sequence, {-(-config.seq_length // mesh.sp_size):,} a rank"
        if config.buckets:
            buckets = Buckets(config, row_lengths(rows), mesh)
            self._row_lengths = buckets.row_lengths
            self.about_rows = f"{buckets.describe()}; at most {self.about_rows}"

    def of_step(self, samples_before: int) -> tuple[int, float | None]:
        """Tokens of a step, and FLOPs (None where they are not known), by the samples that came before it."""
        lengths = [self._length(samples_before + number) for number in range(self.sequences_per_step)]
        return sum(lengths), None if self._is_packed else sum(map(self._flops, lengths))

    def _length(self, sample: int) -> int:
        if self._row_lengths is None:
            return self.config.seq_length
        return int(self._row_lengths[self._order.row(sample)])
