"""PoSE: positions that skip, attention that does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset

from easyctx import apply_seq_parallel_monkey_patch, make_mesh, shift_labels, train
from easyctx.check.float64 import float64_throughout
from easyctx.loss import num_targets, token_loss_sum
from easyctx.mesh import Mesh
from easyctx.patch import use_own_attention
from easyctx.training.pose import shard_with_skips, skipped_positions
from tests.models import VOCAB, ragged_batch, tiny_model
from tests.parity import relative_error, worst_gradient_error
from tests.reference_attention import use_reference
from tests.test_train import flags

LENGTH, TARGET = 36, 300
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def test_positions_are_stretches_of_the_range() -> None:
    ids = torch.randint(0, 1000, (400, 64))
    positions = skipped_positions(ids, 1000, seed=0)
    steps = positions.diff(dim=1)
    assert (positions[:, 0] == 0).all()
    assert (steps >= 1).all()
    assert ((steps > 1).sum(1) <= 1).all()  # two stretches
    skips = (steps - 1).amax(1)
    assert positions.max() <= 999
    # Evenly from none to all that there is room for.
    assert skips.max() > 850
    assert skips.double().mean() == pytest.approx((1000 - 64) / 2, rel=0.1)
    borders = (steps > 1).int().argmax(1)
    assert borders.double().mean() == pytest.approx(31, rel=0.15)


def test_positions_follow_from_row_and_seed() -> None:
    ids = torch.randint(0, 1000, (8, 64))
    positions = skipped_positions(ids, 1000, seed=3)
    for row in range(8):
        assert torch.equal(skipped_positions(ids[row : row + 1], 1000, seed=3), positions[row : row + 1])
    assert not torch.equal(skipped_positions(ids, 1000, seed=4), positions)
    assert len({tuple(row) for row in positions.tolist()}) == 8
    assert torch.equal(skipped_positions(ids, 65, seed=0).amax(1) <= 64, torch.ones(8, dtype=torch.bool))


def parity(
    rank: int, world: int, mode: str, family: str, rope: dict | None, length: int, own: bool = False
) -> dict[str, float]:
    """PoSE in `mode` over all ranks against causal attention over the whole row with the same positions.

    own: with our attention also where the mode is data_parallel.
    """
    overrides = {"rope_parameters": rope, "max_position_embeddings": 64} if rope else {}
    ids, labels = ragged_batch(2, length)
    targets = shift_labels(labels)
    with float64_throughout():
        want = use_reference(tiny_model(family, **overrides))
        logits = want(ids, position_ids=skipped_positions(ids, TARGET, 5)).logits
        want_loss = token_loss_sum(logits, targets) / num_targets(targets)
        want_loss.backward()
        is_sharded = mode != "data_parallel"
        mesh = make_mesh() if is_sharded else Mesh()
        got = tiny_model(family, **overrides)
        got.config.use_cache = False  # as in training; with a cache, stock models look for no borders
        config = SimpleNamespace(parallel_mode=mode, pose_length=TARGET, seed=5)
        sharded_mesh = mesh if is_sharded else None
        patched = use_own_attention(got) if own else apply_seq_parallel_monkey_patch(mode, got, mesh=sharded_mesh)
        with patched:
            local = shard_with_skips(ids, targets, config, mesh, torch.device("cpu"))
            local_targets = local.pop("local_target_ids")
            logits = got(**{name.removeprefix("local_"): given for name, given in local.items()}).logits
            loss = token_loss_sum(logits, local_targets) / num_targets(targets)
            loss.backward()
    loss = loss.detach()
    if is_sharded:
        for tensor in [loss, *(p.grad for p in got.parameters())]:
            dist.all_reduce(tensor)
    return {"loss": relative_error(loss, want_loss), "gradients": worst_gradient_error(got, want)}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_stock_model_does_not_take_skips_for_borders(family: str) -> None:
    # Stock attention takes its softmax in float32.
    errors = parity(0, 1, "data_parallel", family, None, LENGTH)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("rope", [None, DYNAMIC])
def test_own_attention_on_whole_rows_takes_skips(rope: dict | None) -> None:
    errors = parity(0, 1, "data_parallel", "llama", rope, LENGTH, own=True)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize(
    ("mode", "family", "rope", "length"),
    [
        ("zigzag_ring_attn", "llama", None, LENGTH),
        ("ulysses_attn", "llama", DYNAMIC, LENGTH),
        ("striped_attn", "qwen3", None, LENGTH + 1),  # padded; a sliding window
    ],
)
def test_sequence_parallel_modes(ranks, mode: str, family: str, rope: dict | None, length: int) -> None:
    for errors in ranks(2).run(parity, mode, family, rope, length):
        assert max(errors.values()) < 1e-10, errors


def test_the_train_loop_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    ids = torch.randint(3, VOCAB, (4, 101)).tolist()
    Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "data")
    Dataset.from_dict({"input_ids": ids, "document_ids": [[0] * 50 + [1] * 51] * 4}).save_to_disk(tmp_path / "packed")

    def error(**changes: object) -> str:
        assert train.main(flags(tmp_path, tmp_path / "out", **changes)) == 2
        return capsys.readouterr().err

    assert "--pose-length is 101, and --seq-length 101" in error(pose_length=101)
    packed = dict(pose_length=5000, dataset=tmp_path / "packed")
    assert "(document_ids): give --ignore-borders" in error(**packed)


def test_the_config_is_told_of_the_range(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from easyctx.training.flags import parse_arguments
    from easyctx.training.model import load_model_config

    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    config = parse_arguments(flags(tmp_path, tmp_path / "out", pose_length=5000))
    assert load_model_config(config, 1, Accelerator(cpu=True)).max_position_embeddings == 5000
