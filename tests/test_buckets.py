"""Rows of different lengths in one run: few shapes, and the numbers of padding everything to the longest."""

import itertools
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from easyctx.data.load import check_rows, check_targets, row_lengths
from easyctx.engine import use_expandable_segments
from easyctx.mesh import Axis, Mesh
from easyctx.training.buckets import bucket_lengths, check_messages
from easyctx.training.config import check_config_values
from easyctx.training.data import checked_rows, inputs_and_targets, make_loader
from easyctx.training.flags import parse_arguments
from tests.bucket_jobs import LONGEST, Run, bucket_step, rows_of_own_lengths
from tests.models import VOCAB
from tests.parity import relative_error


def config_of(*flags: str):
    return parse_arguments(["--model", "m", "--dataset", "d", "--output-dir", "o", *flags])


@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize(
    ("shortest", "longest"), [(2, 61), (30_000, 100_000), (700, 93_024), (61, 61), (500_000, 1 << 20)]
)
@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_bucket_lengths(multiple: int, shortest: int, longest: int, count: int) -> None:
    lengths = bucket_lengths(shortest, longest, count, multiple)
    assert 1 <= len(lengths) <= count
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == longest
    assert all(length % multiple == 0 for length in lengths[:-1])
    assert count == 1 or lengths[0] >= shortest
    if count > 1 and shortest >= 500:  # rounding aside, each is as many times the last
        ratio = (longest / shortest) ** (1 / (count - 1))
        assert all(b / a < ratio * 1.15 for a, b in itertools.pairwise(lengths))


@pytest.mark.parametrize(
    "run",
    [
        Run("data_parallel", 1, 4),
        Run("zigzag_ring_attn", 2, 4),
        Run("ulysses_attn", 2, 3),
        Run("zigzag_ring_attn", 2, 4, sharded=True),
        Run("zigzag_ring_attn", 2, 4, memory="all"),
        Run("zigzag_ring_attn", 2, 4, family="mixtral"),
        Run("zigzag_ring_attn", 2, 4, borders=True),
    ],
    ids=lambda run: (
        f"{run.mode}-{run.family}{'-fsdp2' * run.sharded}{'-spill' * bool(run.memory)}{'-borders' * run.borders}"
    ),
)
def test_the_same_step_as_padded_to_the_longest(ranks, run: Run) -> None:
    world = 2 * run.sp_degree
    got = ranks(world).run(bucket_step, run)
    everything = replace(run, buckets=1)
    want = ranks(world).run(bucket_step, everything)
    for rank, (found, wanted) in enumerate(zip(got, want, strict=True)):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-10), rank
        assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-10), rank
        for name, weight in wanted["weights"].items():
            assert relative_error(found["weights"][name], weight) < 1e-10, (rank, name)
        assert set(wanted["shapes"]) == {-(-LONGEST // run.sp_degree) + (run.mode[0] == "z")}
        assert max(found["shapes"]) <= wanted["shapes"][0]
    shapes = [found["shapes"] for found in got]
    assert len({length for each in shapes for length in each}) > 1, "more than one length occurred"
    assert any(a != b for a, b in zip(*shapes[:: run.sp_degree], strict=True)), "data-parallel ranks differed in a step"


def test_no_more_shapes_than_asked_for() -> None:
    config = config_of("--seq-length", str(LONGEST), "--buckets", "3")
    rows = checked_rows(config, rows_of_own_lengths(), "d", LONGEST, VOCAB)
    batches = iter(make_loader(rows, config, Mesh()))
    shapes = {inputs_and_targets(next(batches), LONGEST)[0].shape[1] for _ in range(2 * len(rows))}
    assert shapes == set(bucket_lengths(5, LONGEST, 3, 1))


def test_short_rows_need_the_flag_and_the_way_out_is_named() -> None:
    rows = rows_of_own_lengths()
    assert row_lengths(rows).tolist() == [len(ids) for ids in rows["input_ids"]]
    with pytest.raises(ValueError, match="row 0, has 5 tokens, but --seq-length is 61.* give --buckets 8"):
        check_rows(rows, LONGEST, VOCAB)
    check_rows(rows, LONGEST, VOCAB, own_lengths=True)
    single = Dataset.from_dict({"input_ids": [[3] * 9, [3]]})
    with pytest.raises(ValueError, match="row 1 of the dataset has 1 tokens: 2 are needed"):
        check_rows(single, LONGEST, VOCAB, own_lengths=True)
    uneven = Dataset.from_dict({"input_ids": [[3] * 9, [3] * 8], "labels": [[3] * 9, [3] * 7]})
    with pytest.raises(ValueError, match="row 1 of the dataset has 7 labels and 8 input_ids"):
        check_targets(uneven, "labels", LONGEST, row_lengths(uneven))


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--buckets", "-1"), "--buckets is -1"), (("--buckets", "2", "--pose-length", "99999"), "--pose-length 99999")],
)
def test_buckets_that_cannot_be(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config_values(config_of(*flags), 1)


def test_as_many_messages_on_all_ranks() -> None:
    """ZeRO-3 gathers for each tile, and other lengths have other numbers of them."""

    def checked(engine: str, tile: int, dp_size: int, *flags: str) -> None:
        choices = SimpleNamespace(mlp_tile=tile)
        memory: Any = SimpleNamespace(setting=SimpleNamespace(engine=engine), decision=SimpleNamespace(choices=choices))
        check_messages(config_of(*flags), Mesh(dp=Axis(0, dp_size)), memory)

    with pytest.raises(ValueError, match=r"--buckets 4 gives 2 .* tiles of 8,192 .* --mlp-tile 0.*--sp-degree 2"):
        checked("zero3_offload", 8192, 2, "--buckets", "4")
    checked("zero3_offload", 8192, 2)
    checked("zero3_offload", 0, 2, "--buckets", "4")
    checked("zero3_offload", 8192, 1, "--buckets", "4")
    checked("fsdp2", 8192, 2, "--buckets", "4")
    check_messages(config_of("--buckets", "4"), Mesh(dp=Axis(0, 2)), None)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_a_users_choice(name: str) -> None:
    environment: dict[str, str] = {}
    use_expandable_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    chosen = {name: "max_split_size_mb:64"}
    use_expandable_segments(chosen)
    assert chosen == {name: "max_split_size_mb:64"}


def test_pytorch_reads_the_allocators_settings_late() -> None:
    """They are set after torch is imported, before it is used."""
    code = (
        "import os, torch; os.environ['PYTORCH_ALLOC_CONF'] = 'expandable_segments:True';"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.strip() == "expandable_segments:True"
