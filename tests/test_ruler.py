"""RULER: runs of its tasks, NVIDIA's own prompts and predictions, effective length, refusals."""

import json
import re
from pathlib import Path

import pytest

from easyctx.evals.tasks import ruler
from easyctx.evals.tasks.ruler_tasks import effective_length, weighted_average
from tests.eval_helpers import save_tiny_model
from tests.ruler_helpers import solve, write_sources
from tests.task_helpers import Generators, fake_generators, rows_of, summary_of, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192))


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> Generators:
    return fake_generators(monkeypatch)


def test_effective_length_and_weighted_averages() -> None:
    averages = {"4096": {"mean": 0.9}, "8192": {"mean": 0.856}, "16384": {"mean": 0.5}}
    assert effective_length(averages, 85.6) == 8192
    assert effective_length({"4096": {"mean": 0.8}}, 85.6) is None
    assert weighted_average(averages, increasing=True) == pytest.approx((90 + 2 * 85.6 + 3 * 50) / 6)
    assert weighted_average(averages, increasing=False) == pytest.approx((3 * 90 + 2 * 85.6 + 50) / 6)


def test_a_run_of_all_tasks(files: list[str], model: str, tmp_path: Path, generators: Generators) -> None:
    out = tmp_path / "out"
    arguments = ["--model", model, "--lengths", "4700", "6000", "--samples", "1", "--output", str(out), *files]
    generators.reply = lambda prompt: solve(prompt) if len(prompt) < 4700 else "nothing"
    assert ruler.main(arguments) == 0
    summary = summary_of(out)
    assert len(rows_of(out)) == 26
    assert {row["score"] for row in rows_of(out) if row["length"] == 4700} == {1.0}
    assert summary["models"]["tiny"]["average"]["4700"]["num_kinds"] == 13
    assert summary["models"]["tiny"]["average"]["6000"]["mean"] == 0.0
    assert summary["effective_length"] == {"tiny": 4700}
    assert (out / "scores.png").stat().st_size > 1000
    assert ruler.main(arguments) == 0
    assert len(generators) == 1
    assert ruler.main(["--plot-only", "--output", str(out), "--threshold", "101"]) == 0
    assert summary_of(out)["effective_length"] == {"tiny": None}


def test_nvidias_predictions_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three references found counts two thirds; a reading task counts whole; tasks weigh the same."""
    folder = tmp_path / "4096" / "pred"
    folder.mkdir(parents=True)
    row = {"input": "…", "others": {}, "truncated": -1, "length": 4001}
    write_jsonl(
        folder / "niah_multivalue.jsonl", [{"index": 0, "pred": " 11, 22", "outputs": ["11", "22", "33"], **row}]
    )
    answers = [{"index": i, "pred": "PARIS", "outputs": ["paris", "x"], **row} for i in range(3)]
    write_jsonl(folder / "qa_1.jsonl", answers)
    files = [str(folder / "niah_multivalue.jsonl"), str(folder / "qa_1.jsonl")]
    out = tmp_path / "out"
    assert ruler.main(["--score-only", *files, "--labels", "mine", "--output", str(out)]) == 0
    model = summary_of(out)["models"]["mine"]
    assert model["by_length"]["niah_multivalue"]["4096"]["mean"] == pytest.approx(2 / 3)
    assert model["average"]["4096"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert "effective length of mine: none (average of at least 85.6, 2 of 13 tasks)" in capsys.readouterr().out
    (folder / "qa_1.jsonl").rename(folder / "unknown.jsonl")
    assert ruler.main(["--score-only", str(folder / "unknown.jsonl")]) == 2
    assert "'unknown' is no task of RULER" in capsys.readouterr().err


def test_prompts_that_nvidia_prepared(model: str, tmp_path: Path, generators: Generators) -> None:
    folder = tmp_path / "ruler" / "8192" / "data" / "vt"
    folder.mkdir(parents=True)
    rows = [{"index": 7, "input": "Find it.", "answer_prefix": " It is", "outputs": ["AB", "CD"], "length": 40}]
    write_jsonl(folder / "validation.jsonl", rows)
    generators.reply = lambda prompt: "AB" if prompt == "Find it. It is" else ""
    out = tmp_path / "out"
    assert ruler.main(["--data", str(tmp_path / "ruler"), "--model", model, "--output", str(out)]) == 0
    [row] = rows_of(out)
    assert (row["item"], row["length"], row["score"]) == ("vt/8192/7", 8192, 0.5)
    assert generators[0].calls[0]["max_new_tokens"] == 30


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "niah_single_2, .*qa_2 need --haystack and --squad and --hotpotqa; .* --tasks niah_single_1"),
        (["--tasks", "qa_1"], "qa_1 need --squad"),
        (["--tasks", "qa_1", "--squad", "{tmp}/hotpot.json"], "not in SQuAD's form"),
        (["--tasks", "qa_2", "--hotpotqa", "{tmp}/squad.json"], "not in HotpotQA's form"),
        (
            ["--tasks", "vt", "--lengths", "200"],
            "--lengths has 200, 30 of them for the answer: too short for vt: .* room for 170. Raise --lengths",
        ),
        (
            ["--tasks", "niah_single_2", "--lengths", "300", "--haystack", "{tmp}/essay.txt"],
            "too short for niah_single_2",
        ),
        (["--tasks", "vt", "--lengths", "8200"], "tiny: 8200 tokens are beyond its max_position_embeddings 8192"),
        (["--tasks", "vt", "--samples", "0"], "--samples is 0"),
        (["--tasks", "vt", "--data", "{tmp}"], "holds no TASK/"),
        (["--tasks", "vt", "--templates", "{tmp}/bad.json"], "'vt_first' must hold {{name}}, {{value}}"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    flags: list[str],
    says: str,
    model: str,
    files: list[str],
    tmp_path: Path,
    generators: Generators,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(files[1]).parent
    (folder / "bad.json").write_text(json.dumps({"vt_first": "VAR {name}"}))
    asked = [flag.format(tmp=folder) for flag in flags]
    assert ruler.main(["--model", model, "--output", str(tmp_path / "out"), *asked]) == 2
    assert re.search(f"^error: .*{says.format()}", capsys.readouterr().err, re.MULTILINE)
    assert not generators
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ruler.main(["--tasks", "niah", "--output", "x"])
    assert "niah_multikey_3" in capsys.readouterr().err
