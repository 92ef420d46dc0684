"""benchmarks/attention.py on gloo ranks: its work, its errors against float64, other packages' rows, the chart."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from easyctx.band import CAUSAL, Band
from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Saved, Score
from easyctx.layout import CONTIGUOUS
from easyctx.mask import Mask
from tests.test_layout import visible_pairs

FOLDER = str(Path(__file__).parent.parent / "benchmarks")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def settings(*flags: str) -> argparse.Namespace:
    from attention import parse_arguments

    small = ["--heads", "4/2", "--head-dim", "16", "--tokens-per-gpu", "64", "--seconds", "0", "--window", "50"]
    return parse_arguments([*small, "--documents", "5", *flags])


def forget_flash_attn(monkeypatch) -> None:
    """Have no such modules, neither now nor, whatever is installed meanwhile, after the test."""
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)


def rows_of(rank: int, world: int, flags: list[str]) -> list[dict]:
    """Every row of a run, on any rank."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(FOLDER)
        forget_flash_attn(monkeypatch)
        from attention import Bench, cases

        args = settings(*flags)
        bench = Bench(args, CPU)
        for case in cases(args, args.loopback or world, CPU):
            bench.run(case, tqdm(disable=True))
        return bench.rows


@pytest.mark.parametrize("mask", [Mask(), Mask(30), Mask(None, Documents(96, ((0, 7, 50),))), Mask(9, None)], ids=str)
def test_pairs_are_those_that_the_mask_leaves(mask):
    from attention_parts.cases import Case

    case = Case((4, 2), 16, torch.float32, CPU, 2, 48, "any", mask)
    visible = visible_pairs(mask, 96, 1)[0]
    assert case.pairs() == int(visible.sum())
    some = torch.tensor([0, 3, 49, 95])
    assert case.pairs(some) == int(visible[some].sum())
    assert torch.equal(case.first_keys(torch.arange(96)), visible.int().argmax(1))


def test_the_local_kernel_has_as_much_work_as_a_share():
    from attention_parts.cases import Case

    case = Case((4, 2), 16, torch.float32, CPU, 8, 4096)
    alone = case.one_device(case.pairs() / case.ranks)
    assert alone.ranks == 1
    assert alone.mask.is_causal
    assert alone.pairs() == pytest.approx(case.pairs() / 8, rel=0.02)


def test_every_mode_is_right_under_every_mask(ranks):
    """In float64 the errors against float64 vanish, whatever the layout and the mask."""
    flags = ["--dtype", "float64", "--masks", "causal", "window", "packed", "--methods"]
    flags += ["ring_attn", "zigzag_ring_attn", "striped_attn", "dist_flash_attn", "ulysses_attn", "usp_attn"]
    rows = ranks(2).run(rows_of, flags)[0]
    assert len(rows) == 3 * 7
    for row in rows:
        assert "error_message" not in row, row
        assert row["error"] == max(row[f"{name}_error"] for name in ("out", "dq", "dk", "dv"))
        assert row["error"] < 1e-12, row
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["peak_gib"] is None
    local, mode = rows[0], rows[1]
    assert local["method"] == "local kernel"
    assert local["share_of_local"] == 1
    flops = 4 * 16 * 4 * (128 * 129 // 2) / 2 * 3.5
    assert mode["tflops_per_gpu"] == pytest.approx(flops / mode["ms"] / 1e9)
    assert mode["share_of_local"] == pytest.approx(mode["tflops_per_gpu"] / local["tflops_per_gpu"])
    assert mode["exposed_ms"] == pytest.approx(mode["ms"] - flops / local["tflops_per_gpu"] / 1e9)


def test_an_error_is_found():
    """A window that is one too wide, and gradients of another dv."""
    from attention_parts.cases import Case
    from attention_parts.methods import Method
    from attention_parts.sample import sampled_errors

    def errors(band, factor):
        kernel, score = KERNELS["tiled"], Score(0.25)

        def forward(q, k, v):
            out, lse = kernel.forward(q, k, v, band, score)
            return out, Saved(q, k, v, out, lse)

        def backward(state, dout):
            dq, dk, dv = kernel.backward(dout, state[1], band, score)
            return dq, dk, dv * factor

        case = Case((4, 2), 16, torch.float64, CPU, 1, 128, "window", Mask(50))
        return sampled_errors(Method("m", "tiled", CONTIGUOUS, forward, backward), case, 0, 16)

    assert max(errors(Band(-49, 0), 1.0).values()) < 1e-12
    assert min(errors(Band(-50, 0), 1.0).values()) > 1e-3
    assert min(errors(CAUSAL, 1.0).values()) > 1e-2
    assert errors(Band(-49, 0), 1.01)["dv"] == pytest.approx(0.01)


def test_what_does_not_import_is_a_row(ranks):
    flags = ["--methods", "zigzag_ring_attn", "ring_flash_attn_zigzag", "yunchang_usp", "context_parallel_cudnn"]
    rows = {row["method"]: row for row in ranks(2).run(rows_of, flags)[0]}
    assert list(rows) == ["local kernel", *flags[1:]]
    assert "needs ring-flash-attn 0.1.8" in rows["ring_flash_attn_zigzag"]["error_message"]
    assert "needs yunchang 0.6.4" in rows["yunchang_usp"]["error_message"]
    assert "CUDA only, not cpu" in rows["context_parallel_cudnn"]["error_message"]
    assert "ms" not in rows["yunchang_usp"]
    assert rows["zigzag_ring_attn"]["error"] < 1e-2


@pytest.mark.parametrize("mode", ["ring_attn", "zigzag_ring_attn", "dist_flash_attn", "ulysses_attn", "usp_attn"])
def test_one_device_plays_a_rank(mode):
    rows = rows_of(0, 1, ["--loopback", "4", "--heads", "4/4", "--masks", "causal", "packed", "--methods", mode])
    assert [row.get("error_message") for row in rows] == [None] * 4
    looped = rows[1]
    assert (looped["gpus"], looped["ranks"], looped["transport"]) == (1, 4, "loopback")
    assert looped["rank"] == (3 if mode == "ring_attn" else 0)
    assert "error" not in looped
    pairs = looped["tflops_per_gpu"] * looped["ms"] * 1e9 / (4 * 16 * 4 * 3.5)
    share = {"ring_attn": 256 * 257 // 2 - 192 * 193 // 2}.get(mode, 256 * 257 / 8)
    assert pairs == pytest.approx(share, rel=0.03)


def test_loopback_runs_the_blocks_of_that_rank(monkeypatch):
    """The FLOPs counted are those that the kernel is called for."""
    from attention_parts.cases import Case
    from attention_parts.loopback import loopback

    counted = []

    class Counting(type(KERNELS["tiled"])):
        name = "counting"

        def forward(self, q, k, v, band, score):
            counted.append(int(band.allowed(q.shape[1], k.shape[1]).sum()))
            return super().forward(q, k, v, band, score)

    monkeypatch.setitem(KERNELS, "counting", Counting())
    for mode, mask in (("ring_attn", Mask()), ("zigzag_ring_attn", Mask(20)), ("striped_attn", Mask())):
        case = Case((4, 2), 16, torch.float32, CPU, 4, 32, "any", mask)
        method, _, pairs = loopback(mode, "counting", case, 2)
        counted.clear()
        method.forward(*replace(case, ranks=1).shards(CONTIGUOUS, 0)[:3])
        assert sum(counted) == pairs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (20, 0)])
def test_stand_in_counts_as_flash_attn_does(window, packed):
    """Rectangles are masked from their bottom right corner; varlen calls are their documents, one by one."""
    from attention_parts import flash_attn_stand_in as stand_in

    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(n, 2, 8, generator=generator) for n in (24, 40, 40, 24))
    queries, keys = ([0, 10, 24], [0, 10, 40]) if packed else ([0, 24], [0, 40])
    cu = [torch.tensor(t, dtype=torch.int32) for t in (queries, keys)]
    settings = dict(dropout_p=0.0, softmax_scale=0.3, causal=True)
    settings |= dict(window_size_left=window[0], window_size_right=window[1])
    out, lse, *_ = stand_in._flash_attn_varlen_forward(q, k, v, *cu, 30, 40, **settings)
    got = [torch.empty_like(t) for t in (q, k, v)]
    stand_in._flash_attn_varlen_backward(dout, q, k, v, out, lse, *got, *cu, 30, 40, **settings)

    row, column = torch.arange(24)[:, None], torch.arange(40)[None, :]
    document = (row >= 10) & (column >= 10) | (row < 10) & (column < 10) if packed else torch.ones(24, 40).bool()
    lead = torch.where(row < 10, 0, 16) if packed else 16  # from a query to the key at its own place
    seen = document & (column <= row + lead)
    if window[0] >= 0:
        seen &= column >= row + lead - window[0]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("qhd,khd->hqk", *leaves[:2]) * 0.3
    want = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), leaves[2])
    torch.testing.assert_close(out, want.detach(), rtol=1e-5, atol=1e-5)
    for g, w in zip(got, torch.autograd.grad(want, leaves, dout), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    if not packed:
        one_out, one_lse, *_ = stand_in._flash_attn_forward(q[None], k[None], v[None], **settings)
        torch.testing.assert_close(one_out[0], out)
        torch.testing.assert_close(one_lse[0], lse)


def test_stand_in_installs_beside_flash_attn_4(monkeypatch):
    """It adds names to a package that is there already, and gives way to flash-attn 2."""
    from attention_parts import flash_attn_stand_in as stand_in

    forget_flash_attn(monkeypatch)
    four = SimpleNamespace(__path__=[], __spec__=SimpleNamespace(submodule_search_locations=[]), cute="cute")
    monkeypatch.setitem(sys.modules, "flash_attn", four)
    assert stand_in.install()
    assert stand_in.install()
    from flash_attn.flash_attn_interface import _flash_attn_forward

    assert _flash_attn_forward is stand_in._flash_attn_forward
    assert four.cute == "cute"
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", SimpleNamespace())
    assert not stand_in.install()


def test_profile_of_every_method(tmp_path):
    rows_of(0, 1, ["--loopback", "2", "--methods", "zigzag_ring_attn", "--profile", str(tmp_path / "new")])
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {
        f"{name}_torch_cpu_causal_{n}_rank0.txt" for name, n in (("local_kernel", 128), ("zigzag_ring_attn", 64))
    } < names
    table = (tmp_path / "new" / "zigzag_ring_attn_torch_cpu_causal_64_rank0.txt").read_text()
    assert "easyctx::seq_parallel_attention_backward" in table


def test_chart_leaves_failed_rows_out(tmp_path):
    from attention_parts.chart import draw

    row = {"method": "ring_attn", "kernel": "flash4", "mask": "causal", "q_heads": 4, "kv_heads": 2, "gpus": 2}
    row |= {"tokens_per_gpu": 64, "tflops_per_gpu": 5.0, "dtype": "bfloat16", "head_dim": 16, "peak_gib": 1.5}
    failed = {k: v for k, v in row.items() if k != "tflops_per_gpu"} | {"method": "other", "error_message": "no"}
    draw([row, row | {"method": "local kernel", "gpus": 1}, row | {"mask": "window"}, failed], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    draw([failed], tmp_path / "nothing.png")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]


@pytest.mark.parametrize("flags", [["--heads", "32"], ["--heads", "32/5"], ["--heads", "a/b"], ["--loopback", "1"]])
def test_bad_arguments(flags, capsys):
    with pytest.raises(SystemExit) as error:
        settings(*flags)
    assert error.value.code == 2
    assert "error: --" in capsys.readouterr().err
