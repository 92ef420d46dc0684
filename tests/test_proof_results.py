"""benchmarks/proof.py: what it reads of a proof that is not finished, and what it says of where that ran."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from easyctx.training.card import RUN_CARD

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import proof  # noqa: E402
from proof_parts import charts  # noqa: E402

STAGES = [{"name": "2k", "seq_length": 2048}, {"name": "8k", "seq_length": 8192, "rope_theta": 1e5}]
FLAGS = {"rope_theta": None, "rope_factor": None, "pose_length": None, "parallel_mode": "data_parallel"}
METRICS = {"loss": 2.0, "tokens_per_second": 1e5, "peak_gib": 3.0}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The recipe of a proof whose second stage was trained on another machine, and has no evals yet."""
    out = tmp_path / "out"
    write(tmp_path / "proof.yaml", {"model": "start", "output": str(out), "stages": STAGES})
    for name, machine in (("2k", "1xA"), ("8k", "1xB")):
        card = {"config": {"seq_length": 2048, **FLAGS}, "steps": 5, "first_step": METRICS, "last_step": METRICS}
        write(out / name / RUN_CARD, card | {"stages": [{"sequences": 10, "hardware": machine}]})
    launches = {"8k": [{"seconds": 3.0}, {"seconds": 7.04}]}
    write(out / "recipe.json", {"launches": launches})
    share = {"mean": 0.5, "interval": [0.1, 0.9], "num_prompts": 2}
    write(out / "needle" / "2k" / "summary.json", {"by_length": {"2048": share, "4096": share}})
    cell = {"depth": 0.0, "sample": 0, "correct": True, "token_accuracy": 1.0, "logprob": -0.1, "seconds": 0.1}
    write(out / "needle" / "2k" / "cells.jsonl", {"length": 2048, **cell})
    write(out / "needle" / "2k" / "settings.json", {"digits": 7, "distractors": 0, "needles": 1})
    write(out / "times.jsonl", {"task": "needle_2k", "seconds": 1.0, "status": 0, "hardware": "1xA"})
    return tmp_path / "proof.yaml"


def test_every_row_names_its_machine_and_the_file_all_of_them(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = begun.parent / "results"
    monkeypatch.setattr(sys, "argv", ["proof.py", "--recipe", str(begun), "--output", str(results)])
    proof.main()
    (file,) = results.glob("proof_1xA+1xB_*.json")
    rows = {(row["eval"], row["model"], row["size"]): row for row in json.loads(file.read_text())["rows"]}
    assert [rows["training", name, 2048]["hardware"] for name in ("2k", "8k")] == ["1xA", "1xB"]
    assert rows["training", "8k", 2048]["seconds"] == [3.0, 7.0]
    assert rows["needle", "2k", 4096] | {"score": 0.5, "answers": 2, "hardware": "1xA"} == rows["needle", "2k", 4096]
    assert sorted(path.stem for path in results.glob("*.png")) == ["proof_heatmaps", "proof_needle"]


def test_a_model_has_its_colour_in_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    curve = [{"length": 2048, "perplexity": 44.0}, {"length": 4096, "perplexity": None}]
    charts.draw_perplexities(tmp_path / "p.png", {"stages": {"2k": curve, "8k": curve}, "controls": {"8k": curve}})
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in kept[0].axes]
    assert colours[0]["8k"] == colours[1]["8k"] != colours[0]["2k"]
