"""The needle eval as it is run: outputs, resume, refusals, several processes."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from easyctx.evals import needle, needle_scores
from easyctx.evals.models import load_scorer, rope_range
from easyctx.evals.needle_prompts import NeedlePrompts
from easyctx.evals.needle_settings import Cell, NeedleSettings
from easyctx.evals.scoring import AnswerScore
from tests.eval_helpers import encoder, english, run_needle_on_ranks, save_tiny_model
from tests.pool import RankPool

GRID = ["--lengths", "200", "400", "--depths", "3", "--samples", "2", "--digits", "4", "--force"]
TEMPLATES = ["--prefix", "", "--needle", "[K={number}]", "--question", "\\n", "--answer-stub", "[K="]


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "haystack.txt"
    file.write_text(english())
    return str(file)


@pytest.fixture
def arguments(saved_model: str, haystack: str, tmp_path: Path) -> list[str]:
    return ["--model", saved_model, "--haystack", haystack, "--output", str(tmp_path / "out"), *GRID, *TEMPLATES]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded."""
    calls: list[str] = []

    def spy(session: Any, model: str, config: Any) -> Any:
        calls.append(model)
        return load_scorer(session, model, config)

    monkeypatch.setattr(needle, "load_scorer", spy)
    return calls


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.usefixtures("figures")
def test_a_run_leaves_rows_table_picture_and_summary(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle.main(arguments) == 0
    out = tmp_path / "out"
    rows = rows_of(out)
    assert len(rows) == len({(row["length"], row["depth"], row["sample"]) for row in rows}) == 12
    assert len({row["expected"] for row in rows}) == 12
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_prompts"] == 12
    assert set(summary["by_length"]) == {"200", "400"}
    assert set(summary["by_depth"]) == {"0", "50", "100"}
    assert summary["mean"] == sum(row["correct"] for row in rows) / 12
    assert summary["settings"]["needle"] == "[K={number}]"
    assert {"torch", "transformers"} <= set(summary["versions"])
    with (out / "needle.csv").open() as file:
        assert [int(row["length"]) for row in csv.DictReader(file)] == [200] * 6 + [400] * 6
    assert (out / "needle.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "400 tokens are beyond its max_position_embeddings 256; they run" in printed
    assert not [file for file in out.iterdir() if file.name.endswith(".tmp")]


def test_a_killed_run_goes_on_and_a_finished_one_loads_nothing(
    arguments: list[str], tmp_path: Path, loaded: list[str]
) -> None:
    needle.main(arguments)
    file = tmp_path / "out" / "cells.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:7]) + lines[7][:40])
    assert needle.main(arguments) == 0
    assert len(loaded) == 2
    again = rows_of(tmp_path / "out")
    assert [json.loads(line) for line in lines[:7]] == again[:7]
    assert without_seconds(again) == without_seconds([json.loads(line) for line in lines])
    assert needle.main(arguments) == 0
    assert len(loaded) == 2
    more = [*arguments, "--samples", "3", "--resume"]
    assert needle.main(more) == 0
    assert without_seconds(rows_of(tmp_path / "out"))[:12] == without_seconds(again)
    assert len(rows_of(tmp_path / "out")) == 18


def test_a_row_of_another_prompt_is_run_again(arguments: list[str], tmp_path: Path) -> None:
    needle.main(arguments)
    file = tmp_path / "out" / "cells.jsonl"
    rows = rows_of(tmp_path / "out")
    stale = {**rows[3], "prompt_hash": "0" * 16, "prediction": "stale"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], stale, *rows[4:]]))
    needle.main(arguments)
    assert len(rows_of(tmp_path / "out")) == 13
    with (tmp_path / "out" / "needle.csv").open() as table:
        assert "stale" not in [row["prediction"] for row in csv.DictReader(table)]


def test_plot_only_draws_again_without_a_model(arguments: list[str], tmp_path: Path, loaded: list[str]) -> None:
    needle.main(arguments)
    out = tmp_path / "out"
    before = json.loads((out / "summary.json").read_text())
    for name in ("needle.png", "needle.csv"):
        (out / name).unlink()
    assert needle.main(["--plot-only", "--output", str(out)]) == 0
    assert (out / "needle.png").exists()
    assert json.loads((out / "summary.json").read_text()) == before
    assert len(loaded) == 1


def test_several_models_get_a_folder_each(arguments: list[str], tmp_path: Path, saved_model: str) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    i = arguments.index("--model") + 2
    assert needle.main([*arguments[:i], str(tmp_path / "other"), *arguments[i:]]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"tiny", "other", "comparison.png"}
    (tmp_path / "out" / "comparison.png").unlink()
    assert needle.main(["--plot-only", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    tiny, other = (rows_of(tmp_path / "out" / name) for name in ("tiny", "other"))
    assert [row["prompt_hash"] for row in tiny] == [row["prompt_hash"] for row in other]
    assert [row["logprob"] for row in tiny] != [row["logprob"] for row in other]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--haystack", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--haystack", "{tmp}/empty"], "holds no file that ends in .txt"),
        (["--lengths", "12"], r"--lengths has 12, but .* take 1\d"),
        (["--depths", "0", "120"], "--depths has 120"),
        (["--samples", "0"], "--samples is 0"),
        (["--distractors", "2"], "need {city}"),
        (["--digits", "1", "--samples", "3"], "same number"),
        (["--model", "{tmp}/empty"], "without config.json"),
        (["--model", "./nowhere"], "no folder here"),
        (["--sp-degree", "2"], "sequence-parallel degree"),
        (["--parallel_mode", "zigzag_ring_attn"], "2 or more processes"),
        (["--output", "{tmp}/plain"], "is a file"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    flags: list[str],
    says: str,
    arguments: list[str],
    tmp_path: Path,
    loaded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").write_text("")
    assert needle.main([*arguments, *(flag.format(tmp=tmp_path, city="{city}") for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: .*{says}", error, re.MULTILINE)
    assert "Traceback" not in error
    assert loaded == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_mode_is_refused_with_the_choices(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        needle.main([*arguments, "--parallel_mode", "magic"])
    assert exit_info.value.code == 2
    assert "zigzag_ring_attn" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(
    arguments: list[str], tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    needle.main(arguments)
    assert needle.main([*arguments, "--seed", "7"]) == 2
    assert "seed (42 before, 7 now)" in capsys.readouterr().err
    assert len(loaded) == 1
    assert needle.main([*arguments, "--seed", "7", "--overwrite"]) == 0
    assert {row["seed"] for row in rows_of(tmp_path / "out")} == {7}


def test_rope_theta_changes_the_scores(arguments: list[str], tmp_path: Path) -> None:
    needle.main(arguments)
    assert needle.main([*arguments, "--rope-theta", "1e6", "--output", str(tmp_path / "theta")]) == 0
    plain, theta = rows_of(tmp_path / "out"), rows_of(tmp_path / "theta")
    assert [row["prompt_hash"] for row in plain] == [row["prompt_hash"] for row in theta]
    assert all(a["logprob"] != b["logprob"] for a, b in zip(plain, theta, strict=True))


def test_lengths_beyond_the_models_are_asked_about(
    arguments: list[str], tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.remove("--force")
    assert needle.main(arguments) == 2
    says = "error: tiny: 400 tokens are beyond its max_position_embeddings 256: give --rope-theta .* or --force"
    assert re.search(says, capsys.readouterr().err)
    assert not loaded
    assert needle.main([*arguments, "--rope-theta", "1e6"]) == 0


def test_scaled_rope_reaches_as_far_as_it_is_scaled() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    assert rope_range(LlamaConfig(max_position_embeddings=40960, rope_parameters=yarn)) == 131072
    assert rope_range(LlamaConfig(max_position_embeddings=4096)) == 4096


@pytest.mark.parametrize(("right", "correct", "share"), [([True] * 4, True, 1.0), ([True, False] * 2, False, 0.5)])
def test_a_prompt_is_right_if_all_its_tokens_are(right: list[bool], correct: bool, share: float) -> None:
    prompts = NeedlePrompts(encoder("bytes"), english(), 300, NeedleSettings(digits=4))
    prompt = prompts.build(Cell(300, 50, 0))
    answer = [int(token) for token in prompt.ids[prompt.answer_start :]]
    predicted = [token if ok else 65 for token, ok in zip(answer, right, strict=True)]

    class Fixed:
        def score_answers(self, ids: Any, starts: list[int]) -> list[AnswerScore]:
            assert ids[0].tolist() == prompt.ids.tolist()
            return [AnswerScore(predicted=predicted, right=right, logprob=[-0.5, -0.25, 0.0, 0.0])]

    row = needle_scores.score_prompt(Fixed(), prompts, prompt)  # type: ignore[arg-type]
    assert (row["correct"], row["substring"], row["token_accuracy"]) == (correct, correct, share)
    assert row["logprob"] == -0.75
    assert row["expected"] == prompt.answer
    assert (row["prediction"] == prompt.answer) is correct


@pytest.mark.parametrize(("mode", "sp_degree"), [("data_parallel", 1), ("zigzag_ring_attn", 2)])
def test_two_ranks_score_as_one_process(
    mode: str, sp_degree: int, saved_model: str, tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    run_needle_on_ranks(0, 1, "data_parallel", 1, saved_model, str(tmp_path / "one"))
    ranks(2).run(run_needle_on_ranks, mode, sp_degree, saved_model, str(tmp_path / "two"))
    one, two = (sorted(rows_of(tmp_path / name), key=lambda row: row["depth"]) for name in ("one", "two"))
    assert len(one) == 5
    for name in ("depth", "prompt_hash", "prediction", "expected", "correct"):
        assert [row[name] for row in two] == [row[name] for row in one]
    assert [row["logprob"] for row in two] == pytest.approx([row["logprob"] for row in one], abs=1e-3)
    assert (tmp_path / "two" / "needle.png").exists()
