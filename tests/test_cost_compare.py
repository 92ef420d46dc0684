"""benchmarks/cost_model.py: predicted beside measured attention, and the steps of others."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from easyctx.cost.attention import attention_cost
from easyctx.cost.hardware import DEVICES, Cluster
from easyctx.cost.kernels import Curve, KernelRates, flops
from easyctx.cost.stages import Shape, causal_pairs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import cost_model  # noqa: E402
from cost_parts.compare import compare_attention, compare_steps  # noqa: E402

TRUTH = KernelRates("flash4", Curve(500e12, 900), Curve(400e12, 300), "made up")


def measured(**changes: Any) -> dict[str, Any]:
    """A row as benchmarks/attention.py writes it, "measured" on a GPU whose kernels are the made-up ones."""
    row = {"method": "zigzag_ring_attn", "kernel": "flash4", "mask": "causal", "q_heads": 32, "kv_heads": 8}
    row |= {"head_dim": 128, "gpus": 2, "tokens_per_gpu": 8192} | changes
    cluster, shape = Cluster(DEVICES["h200"], 2), Shape(row["tokens_per_gpu"], 32, 8, 128)
    costs = [attention_cost(row["method"], shape, cluster, backward=b, kernel=TRUTH) for b in (False, True)]
    forward, backward = (cost.seconds * 1e3 for cost in costs)
    return row | {"ms": forward + backward, "forward_ms": forward, "backward_ms": backward}


def local(tokens: int) -> dict[str, Any]:
    pairs = causal_pairs(tokens, None)
    work = [flops(pairs, 32, 128, backward=b) for b in (False, True)]
    rates = [curve.rate(tokens / 2) for curve in (TRUTH.forward, TRUTH.backward)]
    forward, backward = (1e3 * flop / rate for flop, rate in zip(work, rates, strict=True))
    row = {"method": "local kernel", "kernel": "flash4", "mask": "causal", "q_heads": 32, "kv_heads": 8, "gpus": 1}
    row |= {"head_dim": 128, "tokens_per_gpu": tokens // 2, "local_tokens": tokens}
    return row | {"ms": forward + backward, "forward_ms": forward, "backward_ms": backward}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"benchmark": "attention", "hardware": "2xNVIDIA-H200", "rows": rows}))
    return path


def test_rates_of_the_local_rows_explain_rows_that_were_made_of_them(tmp_path: Path) -> None:
    rows = [local(8192), local(16384), local(65536), measured(), measured(tokens_per_gpu=65536)]
    rows += [measured(mask="packed"), {**measured(method="ulysses_attn"), "error_message": "ran out"}]
    path = write(tmp_path / "attention.json", rows)
    found = compare_attention(path, None, calibrate=True)
    assert [row["pass"] for row in found if "pass" in row] == ["both", "forward", "backward"] * 2
    for row in found[:6]:
        assert row["error"] == pytest.approx(0, abs=1e-3)
    assert found[6]["not_predicted"] == "documents are not modelled"
    # With the table's rates these kernels look slow.
    assert compare_attention(path, None, calibrate=False)[0]["error"] < -0.1


def test_loopback_rows_have_no_links_to_wait_for(tmp_path: Path) -> None:
    rows = [measured(gpus=1, ranks=2, transport="loopback"), measured()]
    looped, linked = [
        row for row in compare_attention(write(tmp_path / "a.json", rows), None, False) if row["pass"] == "both"
    ]
    assert (looped["transport"], linked["transport"]) == ("loopback", "links")
    assert looped["predicted_ms"] <= linked["predicted_ms"]


def test_steps_say_whose_they_are() -> None:
    rows = compare_steps()
    assert {row["source"] for row in rows} == {"measured", "published"}
    assert max(abs(row["error"]) for row in rows if row["source"] == "measured") < 0.1
    assert max(abs(row["peak_error"]) for row in rows if row["peak_gpu_gib"]) < 0.11
    assert sum(row["fitted"] for row in rows) == 2
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_tokens_per_s"] / row["tokens_per_s"] - 1)


def test_the_script_writes_predictions_that_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--gpus", "2", "16", "--tokens-per-gpu", "8192", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cost_model.py", *arguments])
    assert cost_model.main() == 0
    [modes] = tmp_path.glob("cost_model_modes_predicted_h200_*.json")
    rows = json.loads(modes.read_text())["rows"]
    # Nothing that could be taken for a measurement.
    assert not {"ms", "tflops_per_gpu", "share_of_local"} & set(rows[0])
    for panel in {(r["gpus"], r["q_heads"], r["kv_heads"], r["window"]) for r in rows}:
        of_panel = [r for r in rows if (r["gpus"], r["q_heads"], r["kv_heads"], r["window"]) == panel]
        [chosen] = [r for r in of_panel if r["chosen"]]
        assert chosen["predicted_ms"] <= 1.05 * min(r["predicted_ms"] for r in of_panel)
    assert len(list(tmp_path.glob("cost_model_*_h200.png"))) == 2


def test_files_of_other_benchmarks_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["cost_model.py", "--measured", str(BENCHMARKS / "cost_parts/reference_steps.json")]
    )
    assert cost_model.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "has no rows and hardware" in err
