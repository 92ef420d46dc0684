"""TRL's SFTTrainer with shared sequences against the stock one on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import trainer_jobs
from tests.data_helpers import save_marked_tokenizer
from tests.models import tiny_model

pytest.importorskip("trl", reason="TRL is not installed (pip install 'easyctx[trl]'), so SFTTrainer is not tried here")


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"mode": "zigzag_ring_attn"}),
        (2, {"mode": "ulysses_attn", "packing": True}),
        (4, {"mode": "zigzag_ring_attn", "sp_degree": 2, "batch": 1}),
    ],
)
def test_losses_figures_and_weights(ranks: Any, tmp_path: Path, world: int, changes: dict[str, Any]) -> None:
    from tests.sft_jobs import FIGURES, Sft, fine_tune

    save_marked_tokenizer(tmp_path)
    wanted = fine_tune(0, 1, Sft(str(tmp_path), packing=changes.get("packing", False)))
    for found in ranks(world).run(fine_tune, Sft(str(tmp_path), **changes)):
        for name in FIGURES:
            assert wanted[name]
            assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
        for name, weight in wanted["weights"].items():
            assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name


def test_example(ranks: Any, tmp_path: Path) -> None:
    """train_scripts/with_sft_trainer.py as a user would start it."""
    from tests.sft_jobs import texts

    tiny_model("llama", torch.float32, vocab_size=512).save_pretrained(tmp_path / "model")
    save_marked_tokenizer(tmp_path / "model")
    texts(24).to_json(tmp_path / "rows.jsonl")
    flags = ("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--max-length", "64")
    alone = (*flags, "--mode", "none", "--output-dir", str(tmp_path / "alone"))
    losses = trainer_jobs.example(0, 1, "with_sft_trainer.py", alone)
    shared = (*flags, "--mode", "striped_attn", "--output-dir", str(tmp_path / "shared"))
    for found in ranks(2).run(trainer_jobs.example, "with_sft_trainer.py", shared):
        assert found == pytest.approx(losses, rel=1e-5)
    # AdamW divides gradients by their size, so that the rounding of tiny ones shows; a step moves a weight by 1e-3.
    assert trainer_jobs.saved_difference(tmp_path / "alone", tmp_path / "shared") < 1e-4
