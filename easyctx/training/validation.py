"""Perplexity by length of rows that are not trained on, measured while a model is trained."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from easyctx.data.load import load_tokenised
from easyctx.data.packed import collate
from easyctx.evals.scoring import Scorer
from easyctx.inputs import IGNORE_INDEX
from easyctx.mesh import Mesh
from easyctx.training.config import TrainConfig
from easyctx.training.data import checked_rows, inputs_and_targets
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
    name = config.eval_dataset
    try:
        dataset = load_tokenised(name, _split(Path(name)))
        dataset = dataset.select(range(min(len(dataset), config.eval_rows)))
        return checked_rows(config, dataset, name, max(eval_lengths(config)), vocab_size)
    except ValueError as error:
        raise ValueError(f"--eval-dataset {name}: {error}") from error


def _split(folder: Path) -> str | None:
    """Of a folder with splits, as `easyctx data --validation` makes it, the one that is not trained on."""
    splits = folder.expanduser() / "dataset_dict.json"
    has_it = splits.is_file() and "validation" in json.loads(splits.read_text(encoding="utf-8"))["splits"]
    return "validation" if has_it else None


class Validation:
    """Measures on all ranks together what training would learn of each row: its labels, within its documents."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, mesh: Mesh, rows: Any) -> None:
        self.config, self.mesh, self.rows = config, mesh, rows
        self.device = accelerator.device
        self.ranks = Ranks() if rows is not None else None

    def run_if_due(self, model: Any, step: int) -> dict[str, float]:
        """{"perplexity_LENGTH": …} after every `eval_every`-th step, the token-weighted mean's exponential; else {}.

        A length within which no row has anything to predict, as that of a prompt, is left out.
        """
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
        means = {length: float(t) / float(n) for length, t, n in zip(lengths, total, number, strict=True) if n}
        return {f"perplexity_{length}": math.exp(min(mean, 700.0)) for length, mean in means.items()}

    def _sums(self, scorer: Scorer) -> tuple[torch.Tensor, torch.Tensor]:
        """For each length, the summed loss and the number of tokens of this data-parallel rank's rows."""
        lengths = eval_lengths(self.config)
        sums, counts = torch.zeros(len(lengths), dtype=torch.float64), torch.zeros(len(lengths), dtype=torch.float64)
        size, rank = self.mesh.dp_size, self.mesh.dp_rank
        for begin in range(0, len(self.rows), size):
            # All ranks make the same calls; one that has no row left repeats the last, which does not count.
            mine = begin + rank
            row = collate([self.rows[min(mine, len(self.rows) - 1)]], max(lengths))
            ids, targets, documents = inputs_and_targets(row, max(lengths))
            loss = -scorer.score_targets(ids, targets, documents).logprob[0].double()
            if mine < len(self.rows):
                counted = targets[0] != IGNORE_INDEX
                sums += torch.stack([loss[: length - 1].sum() for length in lengths])
                counts += torch.stack([counted[: length - 1].sum() for length in lengths])
        return sums, counts
