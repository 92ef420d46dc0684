"""Trainer with shared sequences against the stock one on one process: losses, weights, evaluation, saving."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from easyctx.positions import batch_number
from easyctx.trainer import sequence_parallel
from easyctx.trainer.batch import read_batch
from tests import trainer_jobs
from tests.train_helpers import make_inputs
from tests.trainer_jobs import Run, rows


@cache
def oracle(run: Run) -> dict[str, Any]:
    return trainer_jobs.one_process(run)


def check(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Float64 throughout, but for logged losses, which Trainer keeps in float32."""
    for one in found:
        assert one["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert one["norm"] == pytest.approx(wanted["norm"], rel=1e-6)
        for name in ("eval_before", "eval"):
            assert one[name] == pytest.approx(wanted[name], rel=1e-10)
        assert one["tokens"] == wanted["tokens"]
        for name, weight in wanted["weights"].items():
            assert torch.allclose(one["weights"][name], weight, rtol=0, atol=1e-10), name


def test_two_ranks_a_sequence(ranks: Any, tmp_path: Path) -> None:
    """Batches of rows that the collator pads on the right; predictions are whole and in order."""
    wanted = oracle(Run(None, batch=2, eval_batch=2, whole_predictions=True))
    run = Run("zigzag_ring_attn", batch=2, eval_batch=2, whole_predictions=True, save_to=str(tmp_path))
    found = ranks(2).run(trainer_jobs.train, run)
    check(found, wanted)
    for one in found:
        assert one["flops"] == wanted["flops"]
        visible = wanted["labels"] != -100  # stock hides padding from attention, and its logits say nothing
        assert torch.equal(one["labels"], wanted["labels"])
        assert torch.allclose(one["logits"][visible], wanted["logits"][visible], atol=1e-10)
    saved = tmp_path / "last"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert all(torch.equal(weight, found[0]["weights"][name]) for name, weight in model.named_parameters())
    assert "easyctx" not in (saved / "config.json").read_text()

    state = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(wanted["loss"][0], rel=1e-6)
    resumed = ranks(2).run(trainer_jobs.train, Run(**vars(run) | {"resume": True}))
    for one in resumed:
        assert one["loss"] == found[0]["loss"][1:]
        assert all(torch.equal(weight, found[0]["weights"][name]) for name, weight in one["weights"].items())


def test_a_batch_is_numbered_once_a_step(ranks: Any) -> None:
    """To count its targets on all ranks; sharding it takes the same number."""
    wanted = [batch_number(trainer_jobs.pad_right(rows()[at : at + 2])["input_ids"]) for at in (0, 2)]
    assert ranks(2).run(trainer_jobs.numbers_of_a_step) == [wanted, wanted]


@pytest.mark.parametrize(
    ("mode", "sp_degree", "ring_degree"),
    [("zigzag_ring_attn", 2, None), ("striped_attn", 2, None), ("usp_attn", 4, 2)],
)
def test_four_ranks(ranks: Any, mode: str, sp_degree: int, ring_degree: int | None) -> None:
    """SP 2 x DP 2 takes the samples of one process with twice the batch."""
    wanted = oracle(Run(None, batch=2))
    found = ranks(4).run(trainer_jobs.train, Run(mode, sp_degree, ring_degree, batch=2 * sp_degree // 4))
    check(found, wanted)


@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "ulysses_attn"])
def test_packed(ranks: Any, mode: str) -> None:
    wanted = oracle(Run(None, batch=3, packed=True, eval_batch=2))
    check(ranks(2).run(trainer_jobs.train, Run(mode, batch=3, packed=True, eval_batch=2)), wanted)


def test_example(ranks: Any, tmp_path: Path) -> None:
    """train_scripts/with_trainer.py, with AdamW and checkpointed layers, as a user would start it."""
    inputs = make_inputs(tmp_path)
    flags = ("--model", str(inputs / "model"), "--dataset", str(inputs / "data"), "--gradient-checkpointing")
    alone = (*flags, "--mode", "none", "--output-dir", str(tmp_path / "alone"))
    losses = trainer_jobs.example(0, 1, "with_trainer.py", alone)
    shared = (*flags, "--sp-degree", "2", "--output-dir", str(tmp_path / "shared"))
    for found in ranks(2).run(trainer_jobs.example, "with_trainer.py", shared):
        assert found == pytest.approx(losses, rel=1e-5)
    # AdamW divides gradients by their size, so that the rounding of tiny ones shows; a step moves a weight by 1e-3.
    assert trainer_jobs.saved_difference(tmp_path / "alone", tmp_path / "shared") < 1e-4


@pytest.mark.parametrize(
    ("run", "what", "words"),
    [
        (Run("ring_attn", 3), "", ["3", "2 processes", "use one of"]),
        (Run("ring_attn", settings=(("label_smoothing_factor", 0.1),)), "", ["label_smoothing_factor", "0.1"]),
        (Run("ring_attn", settings=(("average_tokens_across_devices", False),)), "", ["average_tokens", "True"]),
        (Run("ring_attn", settings=(("accelerator_config", {"dispatch_batches": True}),)), "", ["dispatch_batches"]),
        (Run("ring_attn"), "loss", ["compute_loss_func"]),
        (Run("ring_attn"), "samples", ["different samples", "2 ranks"]),
        (Run("ring_attn", batch=2), "left", ["pad on the right"]),
    ],
)
def test_refusals(ranks: Any, run: Run, what: str, words: list[str]) -> None:
    for message in ranks(2).run(trainer_jobs.refusal, run, what):
        assert all(word in message for word in words), message


def test_trainers_that_are_not_taken() -> None:
    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...

    with pytest.raises(ValueError, match="Own has its own compute_loss"):
        sequence_parallel(Own)
    with pytest.raises(ValueError, match="dict has no compute_loss"):
        sequence_parallel(dict)
    with pytest.raises(ValueError, match="unknown parallel mode 'ring'"):
        sequence_parallel(Trainer, "ring")
    with pytest.raises(ValueError, match="data_parallel shares no sequences: use Trainer itself"):
        sequence_parallel(Trainer, "data_parallel")


def test_read_padded_batch() -> None:
    batch = trainer_jobs.pad_right(rows((5, 3)))
    whole = read_batch(batch)
    assert whole.documents is None
    assert whole.tokens == 8
    assert whole.targets is not None
    assert torch.equal(whole.targets[:, :4], batch["labels"][:, 1:])
    assert bool((whole.targets[:, 4] == -100).all())
    # Positions of padding say nothing, whatever a collator puts there.
    for tail in (0, 1, 3):
        positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, tail, tail]])
        assert read_batch({**batch, "position_ids": positions}).documents is None


def test_read_packed_batch() -> None:
    """By positions or by cumulated lengths: no target in another document, even where its first label is given."""
    ids = torch.arange(1, 8)[None]
    for borders in (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 7])},
    ):
        whole = read_batch({"input_ids": ids, "labels": ids, **borders})
        assert whole.documents is not None
        assert whole.documents.starts == ((0, 3, 5, 6),)
        assert whole.targets is not None
        assert whole.targets.tolist() == [[2, 3, -100, 5, -100, -100, -100]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, "row 1 and shows later ones: pad on the right"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, "row 1 has labels on tokens"),
        ({"position_ids": torch.tensor([[0, 1, 2], [0, 2, 3]])}, "go from 0 to 2"),
        ({"labels": torch.tensor([1, 0])}, "labels has shape"),
        ({"pixel_values": torch.zeros(1)}, "pixel_values, which sequence parallelism does not shard"),
    ],
)
def test_batches_that_are_not_taken(change: dict[str, torch.Tensor], words: str) -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        read_batch({"input_ids": ids, "labels": ids} | change)
