"""Sharding batches: shapes, padding, shifted labels, data loaders, and the inverse."""

import weakref

import pytest
import torch
from accelerate.state import PartialState
from torch.utils.data import DataLoader

from easyctx import gather_sequence, make_mesh, prepare_dataloader, prepare_seq_parallel_inputs, shift_labels
from easyctx.documents import Documents
from easyctx.inputs import is_real_token
from easyctx.mesh import Axis, Mesh, leave_processes
from easyctx.modes import MODES, check_mode
from tests.pool import RankPool
from tests.test_parity import SHARDED_MODES


@pytest.mark.parametrize("mode", SHARDED_MODES)
@pytest.mark.parametrize("length", [5, 12, 31])
@pytest.mark.parametrize("world", [2, 3])
def test_shards_hold_every_token_once(mode, length, world):
    ids = torch.arange(100, 100 + 2 * length).view(2, length)
    targets = shift_labels(ids)
    ring_degree = world if mode == "usp_attn" else None
    shards = [
        prepare_seq_parallel_inputs(mode, ids, None, targets, r, world, "cpu", ring_degree=ring_degree)
        for r in range(world)
    ]
    layout = MODES[mode].shard_layout(world, ring_degree)
    whole = {k: layout.unshard([s[f"local_{k}"] for s in shards]) for k in ("input_ids", "position_ids", "target_ids")}
    assert torch.equal(whole["input_ids"][:, :length], ids)
    assert torch.equal(whole["target_ids"][:, :length], targets)
    assert (whole["target_ids"][:, length:] == -100).all()
    expected = torch.arange(whole["position_ids"].shape[1]).clamp(max=length - 1)
    assert torch.equal(whole["position_ids"], expected.expand(2, -1)), "padding repeats the last position"
    real = [is_real_token(mode, length, r, world, ring_degree)[None] for r in range(world)]
    assert layout.unshard(real)[0].tolist() == [i < length for i in range(len(expected))]


def test_packed_rows_are_padded_with_a_document():
    ids, documents = torch.arange(10)[None], Documents(10, ((0, 4),))
    shards = [
        prepare_seq_parallel_inputs("zigzag_ring_attn", ids, None, None, r, 3, "cpu", documents=documents)
        for r in range(3)
    ]
    assert {shard["documents"] for shard in shards} == {Documents(12, ((0, 4, 10),))}
    positions = MODES["zigzag_ring_attn"].layout.unshard([s["local_position_ids"] for s in shards])
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]]
    found = prepare_seq_parallel_inputs("ring_attn", ids, positions[:, :10], None, 2, 3, "cpu")
    assert found["local_position_ids"].tolist() == [[4, 5, 0, 1]], "the same where only the positions say so"
    with pytest.raises(ValueError, match="documents are those of rows of 10 tokens, but the rows have 9"):
        prepare_seq_parallel_inputs("ring_attn", ids[:, :9], None, None, 0, 3, "cpu", documents=documents)


def test_documents_of_one_row_hold_for_all_rows():
    ids = torch.arange(12).view(2, 6)
    got = prepare_seq_parallel_inputs("ring_attn", ids, None, None, 1, 2, "cpu", documents=Documents(6, ((0, 2),)))
    assert got["local_position_ids"].tolist() == [[1, 2, 3]] * 2


def test_labels_shift_within_documents():
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert shift_labels(labels, Documents(5, ((0, 2),))).tolist() == [[2, -100, 4, 5, -100]]
    twice = labels.expand(2, -1)
    assert shift_labels(twice, Documents(5, ((0, 2),))).tolist() == [[2, -100, 4, 5, -100]] * 2, "of all rows"
    each = shift_labels(twice, Documents(5, ((0, 2), (0, 1, 4)))).tolist()
    assert each == [[2, -100, 4, 5, -100], [-100, 3, 4, -100, -100]]
    with pytest.raises(ValueError, match="documents are those of 2 rows, but the batch has 1"):
        shift_labels(labels, Documents(5, ((0, 2), (0, 1))))


def test_labels_shift_before_sharding():
    labels = torch.tensor([[1, 2, 3, 4]])
    assert shift_labels(labels).tolist() == [[2, 3, 4, -100]]
    shard = prepare_seq_parallel_inputs("ring_attn", labels, None, shift_labels(labels), 0, 2, "cpu")
    assert shard["local_target_ids"].tolist() == [[2, 3]], "the label at the shard's edge is the next shard's first"


def test_data_parallel_is_the_whole_batch():
    ids = torch.arange(6).view(1, 6)
    got = prepare_seq_parallel_inputs("data_parallel", ids, None, None, 0, 4, "cpu")
    assert torch.equal(got["local_input_ids"], ids)
    assert got["local_target_ids"] is None


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match=r"target_ids has shape \(1, 5\), input_ids \(1, 6\)"):
        prepare_seq_parallel_inputs("ring_attn", torch.zeros(1, 6), None, torch.zeros(1, 5), 0, 2, "cpu")


@pytest.mark.parametrize(
    ("mode", "degree", "world", "message"),
    [
        ("ring_attn", None, 1, "launch more"),
        ("ring_attn", 1, 4, "sequence-parallel degree is 1"),
        ("ring_attn", 3, 4, r"degree of 3 does not divide 4 processes: use one of \[1, 2, 4\]"),
        ("data_parallel", 2, 4, "has a sequence-parallel degree of 1, got 2"),
    ],
)
def test_refused_degrees(mode, degree, world, message):
    with pytest.raises(ValueError, match=message):
        check_mode(mode, degree, world)


@pytest.mark.parametrize(
    ("mode", "ring_degree", "message"),
    [
        ("usp_attn", None, r"usp_attn needs a ring degree .*: one of \[1, 2, 3, 6\]"),
        (
            "usp_attn",
            4,
            r"ring degree of 4 does not divide the 6 ranks that share a sequence: use one of \[1, 2, 3, 6\]",
        ),
        ("zigzag_ring_attn", 2, "a ring degree of 2 was given, but zigzag_ring_attn is one ring over all 6 ranks"),
        ("ulysses_attn", 3, "ulysses_attn is Ulysses over all 6 ranks of a sequence: leave it out, or use usp_attn"),
        ("data_parallel", 2, "data_parallel has a ring degree of 1, got 2"),
    ],
)
def test_refused_ring_degrees(mode, ring_degree, message):
    with pytest.raises(ValueError, match=message):
        check_mode(mode, None if mode != "data_parallel" else 1, 6, ring_degree)


def gathered(rank, world, mode):
    ring_degree = 3 if mode == "usp_attn" else None
    mesh = make_mesh(ring_degree=ring_degree)
    ids = torch.randint(0, 99, (2, 13))
    local = prepare_seq_parallel_inputs(
        mode, ids, None, None, mesh.sp_rank, mesh.sp_size, "cpu", ring_degree=ring_degree
    )
    assert torch.equal(gather_sequence(mode, local["local_input_ids"], mesh, 13), ids)
    # Every rank computes the same from the whole, and each gets its own tokens' gradient.
    shard = local["local_input_ids"].double().requires_grad_()
    gather_sequence(mode, shard, mesh, 13, differentiable=True).square().sum().backward()
    expected = torch.cat([2.0 * ids, torch.zeros(2, shard.shape[1] * world - 13)], dim=1)
    layout = MODES[mode].shard_layout(world, ring_degree)
    assert torch.equal(shard.grad, layout.shard(expected, world, rank).double())


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_gather_sequence(ranks, mode):
    ranks(3).run(gathered, mode)


def drawn(rank, world, mode, sp_degree, with_generator):
    PartialState._shared_state.clear()
    accelerator = type("A", (), {"device": torch.device("cpu")})()
    rows = [{"input_ids": torch.tensor([i])} for i in range(8)]
    torch.manual_seed(rank)  # a script that seeds its processes differently, or not at all
    loader = DataLoader(rows, batch_size=2, shuffle=True, generator=torch.Generator() if with_generator else None)
    mesh = make_mesh(sp_degree)
    batches = prepare_dataloader(mode, loader, accelerator, mesh)
    return mesh.dp_rank, [i for b in batches for i in b["input_ids"].flatten().tolist()]


@pytest.mark.parametrize(("mode", "sp_degree"), [("zigzag_ring_attn", 2), ("data_parallel", 1), ("ring_attn", 4)])
@pytest.mark.parametrize("with_generator", [True, False])
def test_data_are_drawn_by_data_parallel_rank(ranks, mode, sp_degree, with_generator):
    by_dp_rank = {}
    for dp_rank, rows in ranks(4).run(drawn, mode, sp_degree, with_generator):
        assert by_dp_rank.setdefault(dp_rank, rows) == rows, "ranks of one sequence drew different samples"
    assert sorted(i for rows in by_dp_rank.values() for i in rows) == list(range(8))


def leaving_drops_every_group(rank, world):
    mesh = make_mesh()
    group = weakref.ref(mesh.sp_group)
    leave_processes()
    assert mesh.sp_group is None
    assert not torch.distributed.is_initialized()
    return group() is None


def test_no_process_group_outlives_leaving():
    """One that did would abort the process when Python exits."""
    pool = RankPool(2)  # its own, since its ranks are of no use afterwards
    try:
        assert pool.run(leaving_drops_every_group) == [True, True]
    finally:
        pool.close()


def test_a_mesh_tells_of_two_axes_only_where_there_are_two():
    two, four = Axis(0, 2), Axis(0, 4)
    assert str(Mesh()) == "SP 1 x DP 1"
    assert str(Mesh(sp=two, dp=two)) == "SP 2 x DP 2"
    assert str(Mesh(sp=four, ring=two, ulysses=two)) == "SP 4 (ring 2 x Ulysses 2) x DP 1"
