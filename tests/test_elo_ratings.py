"""Elo: ratings worked out by hand, balanced rounds, what is read of verdicts, questions and answers."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest

from easyctx.evals import elo
from easyctx.evals.tournament.data import read_answers, read_questions
from easyctx.evals.tournament.judge import read_scores
from easyctx.evals.tournament.ratings import Battle, bootstrap, bradley_terry, expected, schedule
from easyctx.evals.tournament.ratings import elo as elo_of
from tests.task_helpers import write_jsonl


def test_elo_by_hand() -> None:
    """1000 against 1000: a win moves 16; then 1016 against 984 is expected at 1/(1+10^(-32/400)) = 0.54593."""
    one = elo_of([Battle("a", "b", 1.0)], ["a", "b"])
    assert one == {"a": 1016.0, "b": 984.0}
    assert expected(1016, 984) == pytest.approx(0.54593, abs=1e-5)
    two = elo_of([Battle("a", "b", 1.0), Battle("b", "a", 1.0)], ["a", "b"])
    assert two["a"] == pytest.approx(1016 - 32 * (1 - expected(984, 1016)))
    tied = elo_of([Battle("a", "b", 0.5)], ["a", "b"], k=10, start=1500)
    assert tied == {"a": 1500.0, "b": 1500.0}


def test_bradley_terry_of_one_pair_has_a_closed_form() -> None:
    """With half a win more for either side, 7.5 against 2.5 wins are odds of three."""
    battles = [Battle("a", "b", 1.0)] * 7 + [Battle("b", "a", 1.0)] * 2
    got = bradley_terry(battles, ["a", "b"])
    assert got["a"] - got["b"] == pytest.approx(400 * math.log10(3), abs=1e-3)
    assert sum(got.values()) == pytest.approx(2000)
    alone = bradley_terry([Battle("a", "b", 1.0)] * 5, ["a", "b"])
    assert alone["a"] - alone["b"] == pytest.approx(400 * math.log10(11), abs=1e-3)


def test_bradley_terry_does_not_depend_on_the_order() -> None:
    battles = [Battle("a", "b", 1.0), Battle("b", "c", 1.0), Battle("a", "c", 0.5), Battle("c", "a", 0.0)] * 3
    forward, back = bradley_terry(battles, ["a", "b", "c"]), bradley_terry(battles[::-1], ["c", "b", "a"])
    assert forward == pytest.approx(back)
    assert forward["a"] > forward["b"] > forward["c"]


def test_bootstrap_draws_questions_whole() -> None:
    apart = [Battle("a", "b", float(i % 2), None) for i in range(40)]
    together = [Battle("a", "b", float(i % 2), f"{i // 20}") for i in range(40)]
    [wide, narrow] = [bootstrap(bradley_terry, each, ["a", "b"], resamples=60)["a"] for each in (apart, together)]
    assert wide[1] - wide[0] > 20
    assert narrow[0] == pytest.approx(narrow[1])  # both questions ended ten to ten


def test_rounds_are_balanced_and_do_not_depend_on_their_number() -> None:
    rounds = schedule([f"q{i}" for i in range(10)], ["a", "b", "c"], 60, seed=42)
    assert len(rounds) == len(set(rounds)) == 60
    assert set(Counter((each.first, each.second) for each in rounds).values()) == {10}
    for one, two in zip(rounds[::2], rounds[1::2], strict=True):
        assert (one.question, one.first, one.second) == (two.question, two.second, two.first)
    assert schedule([f"q{i}" for i in range(10)], ["a", "b", "c"], 30, seed=42) == rounds[:30]
    assert schedule([f"q{i}" for i in range(10)], ["a", "b", "c"], 60, seed=1) != rounds


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("8 9\nBecause …", (8, 9)),
        ("**7.5, 10**\n", (7.5, 10)),
        ("Here are my scores:\n\n8\t9", (8, 9)),
        ("8 9\nIn short: 8 9\n8 9", (8, 9)),
        ("8 9\n9 8", None),  # two verdicts
        ("8/10 9/10", None),
        ("-8 9", None),
        ("- 8 9", (8, 9)),
        ("8/10", None),
        ("0 11", None),
        ("Assistant 1: 8, assistant 2: 9", None),
        ("", None),
    ],
)
def test_scores_are_read_from_one_line_or_not_at_all(text: str, want: tuple[float, float] | None) -> None:
    assert read_scores(text) == want


def test_battles_in_lmsys_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"model_a": "a", "model_b": "b", "winner": winner} for winner in ("model_a", "tie", "tie (bothbad)")]
    file = write_jsonl(tmp_path / "battles.jsonl", rows)
    assert elo.main(["--score-only", str(file)]) == 0
    assert re.search(r"1\. a +1013\.20 .*1 won, 2 tied, 0 lost", capsys.readouterr().out)
    write_jsonl(file, [{"model_a": "a", "model_b": "b", "winner": "nobody"}])
    assert elo.main(["--score-only", str(file)]) == 2
    assert "the winner is 'nobody', none of model_a" in capsys.readouterr().err
    write_jsonl(file, [{"scores": [3, 4]}])
    assert elo.main(["--score-only", str(file)]) == 2
    assert "line 1 has none of first" in capsys.readouterr().err
    write_jsonl(file, [{"first": "a", "second": "b", "question": "1", "scores": [3]}])
    assert elo.main(["--score-only", str(file)]) == 2
    assert "line 1: scores are [3], not two numbers" in capsys.readouterr().err


def test_questions_and_answers_in_mt_benchs_form(tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question_id": 81, "turns": ["First?", "Second?"]}])
    rows = [{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["One.", "Two."]}]}]
    one, two = write_jsonl(tmp_path / "one.jsonl", rows), write_jsonl(tmp_path / "two.jsonl", rows)
    assert read_questions(questions) == {"81": "First?"}
    assert read_answers([one, two], ["x", "y"]) == {"x": {"81": "One."}, "y": {"81": "One."}}
    with pytest.raises(ValueError, match="two files of --answers are of 'm'"):
        read_answers([one, two], None)
