"""A needle grid for a fraction of its cost: the rows that each prompt alone has, verified, resumed, refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from easyctx.evals import needle, needle_scores, trunk
from easyctx.evals.scoring import Scorer
from easyctx.evals.session import Session
from easyctx.mesh import Mesh
from tests.eval_helpers import english
from tests.models import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def arguments(saved_model: str, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(english())
    return [
        "--model", saved_model, "--haystack", str(tmp_path / "text.txt"), "--force", "--lengths", "400", "800", "1200",
        "--depths", "0", "33.3", "50", "100", "--prefix", "", "--needle", "[K={number}]", "--question", "\\n",
        "--answer-stub", "[K=",
    ]  # fmt: skip


def rows_of(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    return {(row["length"], row["depth"], row["sample"]): row for row in rows}


@pytest.mark.parametrize(
    ("depth_by", "keys", "num_cells"),
    [("fraction", "layers", 12), ("place", "host", 12), ("position", "auto", 9), ("position", "layers", 9)],
)
def test_a_grid_has_the_rows_that_each_prompt_alone_has(
    depth_by: str, keys: str, num_cells: int, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--depth-by", depth_by]
    assert needle.main([*arguments, "--output", str(tmp_path / "alone"), "--each-prompt-alone"]) == 0
    assert needle.main([*arguments, "--output", str(tmp_path / "grid"), "--verify", "3", "--trunk-keys", keys]) == 0
    assert "verified 3 prompts against running each alone" in capsys.readouterr().out
    alone, grid = rows_of(tmp_path / "alone"), rows_of(tmp_path / "grid")
    assert len(alone) == num_cells
    for cell, row in grid.items():
        assert row["logprob"] == pytest.approx(alone[cell]["logprob"], abs=1e-3)
        for name in ("prompt_hash", "expected", "prediction", "correct", "needle_start"):
            assert row[name] == alone[cell][name]
    found = json.loads((tmp_path / "grid" / "verify.json").read_text())
    assert 0 < found["max_logit_difference"] < 1e-3
    assert all(each["same_predictions"] for each in found["prompts"])
    assert len({each["length"] for each in found["prompts"]}) > 1


def test_verify_sees_a_wrong_trunk(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trunk.common_length
    monkeypatch.setattr(trunk, "common_length", lambda a, b: min(original(a, b) + 20, len(a), len(b)))
    needle.main([*arguments, "--output", str(tmp_path / "out"), "--verify", "2"])
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["max_logit_difference"] > 1e-2


def test_a_killed_grid_by_position_goes_on(arguments: list[str], tmp_path: Path) -> None:
    arguments += ["--depth-by", "position", "--output", str(tmp_path / "out")]
    needle.main(arguments)
    file = tmp_path / "out" / "cells.jsonl"
    before, lines = rows_of(tmp_path / "out"), file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:30])
    assert needle.main(arguments) == 0
    assert file.read_text().splitlines(keepends=True)[:3] == lines[:3]
    assert {cell: row["prompt_hash"] for cell, row in rows_of(tmp_path / "out").items()} == {
        cell: row["prompt_hash"] for cell, row in before.items()
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--depth-by", "place", "--needle", "{city} {number}", "--answer-stub", "{city} ", "--distractors", "2"],
         "--distractors 2 lie at fractions"),
        (["--verify", "-1"], "--verify takes a number"),
        (["--verify", "2", "--each-prompt-alone"], "--verify takes a number"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    flags: list[str], says: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle.main([*arguments, *flags, "--output", str(tmp_path / "out")]) == 2
    assert re.search(f"^error: .*{says}", capsys.readouterr().err, re.MULTILINE)


def test_families_without_a_trunk_run_alone_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    session = Session("data_parallel", Mesh(), CPU, torch.float32)
    assert needle_scores.make_trunk_scorer(session, Scorer(model, "data_parallel", Mesh(), CPU), 100) is None
    assert "every prompt is run alone: the RoPE of this llama" in capsys.readouterr().out
