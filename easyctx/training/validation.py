"""Perplexity by length of rows that are not trained on, measured while a model is trained."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from easyctx.data.load import check_rows, load_tokenised
from easyctx.evals.scoring import Scorer
from easyctx.inputs import shift_labels
from easyctx.mesh import Mesh
from easyctx.training.config import TrainConfig
from easyctx.training.ranks import Ranks

HALVINGS = 6


def eval_lengths(config: TrainConfig) -> list[int]:
    """The lengths to report: those asked for, or the sequence's, its half, … down to a 64th."""
    halves = [config.seq_length >> n for n in range(HALVINGS + 1)]
    return sorted(config.eval_lengths or {length for length in halves if length >= 2})


def load_eval_rows(config: TrainConfig, vocab_size: int) -> Any:
    """The rows of --eval-dataset, checked as training's are; None without one."""
    if config.eval_dataset is None:
        return None
    dataset = load_tokenised(config.eval_dataset)
    try:
        check_rows(dataset, max(eval_lengths(config)), vocab_size)
    except ValueError as error:
        raise ValueError(f"--eval-dataset {config.eval_dataset}: {error}") from error
    number = min(len(dataset), config.eval_rows)
    return dataset.select(range(number)).select_columns(["input_ids"]).with_format("torch")


class Validation:
    """Measures on all ranks together; each row counts as one document, from its first token."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, mesh: Mesh, rows: Any) -> None:
        self.config, self.mesh, self.rows = config, mesh, rows
        self.device = accelerator.device
        self.ranks = Ranks() if rows is not None else None

    def run_if_due(self, model: Any, step: int) -> dict[str, float]:
        """{"perplexity_LENGTH": …} after every `eval_every`-th step, the token-weighted mean's exponential; else {}."""
        if self.ranks is None or step % self.config.eval_every:
            return {}
        model.eval()
        try:
            sums, counts = self._sums(Scorer(model, self.config.parallel_mode, self.mesh, self.device))
        finally:
            model.train()
        lengths = eval_lengths(self.config)
        parts = self.ranks.gather((sums, counts) if self.mesh.sp_rank == 0 else None)
        total, number = (sum(part[i] for part in parts if part is not None) for i in range(2))
        means = [float(t) / max(float(n), 1.0) for t, n in zip(total, number, strict=True)]
        return {f"perplexity_{n}": math.exp(min(mean, 700.0)) for n, mean in zip(lengths, means, strict=True)}

    def _sums(self, scorer: Scorer) -> tuple[torch.Tensor, torch.Tensor]:
        """For each length, the summed loss and the number of tokens of this data-parallel rank's rows."""
        lengths = eval_lengths(self.config)
        sums, counts = torch.zeros(len(lengths), dtype=torch.float64), torch.zeros(len(lengths), dtype=torch.float64)
        size, rank = self.mesh.dp_size, self.mesh.dp_rank
        for begin in range(0, len(self.rows), size):
            # All ranks make the same calls; one that has no row left repeats the last, which does not count.
            mine = begin + rank
            ids = self.rows[min(mine, len(self.rows) - 1)]["input_ids"][None, : max(lengths)]
            loss = -scorer.score_targets(ids, shift_labels(ids)).logprob[0].double()
            if mine < len(self.rows):
                sums += torch.stack([loss[: length - 1].sum() for length in lengths])
                counts += torch.tensor([length - 1.0 for length in lengths])
        return sums, counts
