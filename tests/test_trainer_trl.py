"""TRL's SFTTrainer with shared sequences against the stock one on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_helpers import save_plain_tokenizer

pytest.importorskip("trl", reason="TRL is not installed (pip install trl), so that SFTTrainer is not tried here")


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

    save_plain_tokenizer(tmp_path)
    wanted = fine_tune(0, 1, Sft(str(tmp_path), packing=changes.get("packing", False)))
    for found in ranks(world).run(fine_tune, Sft(str(tmp_path), **changes)):
        for name in FIGURES:
            assert wanted[name]
            assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
        for name, weight in wanted["weights"].items():
            assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name
