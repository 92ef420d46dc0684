"""Perplexity: exact by length from one pass, sliding windows, resume, refusals, several processes."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from easyctx.evals import perplexity
from easyctx.evals.documents import Document
from easyctx.evals.perplexity_report import by_position, curve
from easyctx.evals.perplexity_windows import LAST, Window, prefix_nll, score_document, sliding_nll
from tests.eval_helpers import (
    nll_of,
    one_process_scorer,
    perplexity_arguments,
    run_perplexity_on_ranks,
    save_tiny_model,
    tiny_llama,
    tokenizer,
)
from tests.pool import RankPool
from tests.task_helpers import summary_of


@pytest.fixture
def arguments(saved_model: str, tmp_path: Path) -> list[str]:
    return perplexity_arguments(saved_model, tmp_path)


def test_one_pass_gives_every_length_exactly(arguments: list[str], tmp_path: Path) -> None:
    assert perplexity.main(arguments) == 0
    summary = summary_of(tmp_path / "out")
    for length in (64, 300):
        texts = [(tmp_path / "texts" / f"{number}.txt").read_text() for number in range(3)]
        nll = [nll_of(np.array(tokenizer("bytes")(text)["input_ids"][:length])) for text in texts]
        want = math.exp(sum(each.sum() for each in nll) / sum(len(each) for each in nll))
        assert summary["perplexity"]["tiny"][str(length)] == pytest.approx(want, rel=1e-5)
    [first, last] = summary["curves"]["tiny"]
    assert (first["num_documents"], first["num_tokens"], last["num_tokens"]) == (3, 3 * 63, 3 * 299)
    assert last["low"] < last["perplexity"] < last["high"]
    bins = summary["by_position"]["tiny"]
    assert (bins[0]["begin"], bins[-1]["end"]) == (0, 299)
    total = sum(each["mean_nll"] * each["num_tokens"] for each in bins)
    assert total / (3 * 299) == pytest.approx(last["mean_nll"])
    with (tmp_path / "out" / "perplexity.csv").open() as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["64", "300"]
    for name in ("perplexity.png", "perplexity_by_position.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_a_sliding_window_scores_each_token_once_with_its_context() -> None:
    ids = np.random.default_rng(0).integers(0, 256, 100)
    got = sliding_nll(one_process_scorer(tiny_llama()), ids, window=40, stride=15)
    want = list(nll_of(ids[:40]))
    for begin in (15, 30, 45, 60):
        end = min(begin + 40, 100)
        want.extend(nll_of(ids[begin:end])[len(want) - begin :])
    assert len(got) == 99
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_sliding_window_as_long_as_the_document_is_the_prefix() -> None:
    ids = np.random.default_rng(0).integers(0, 256, 50)
    scorer = one_process_scorer(tiny_llama())
    np.testing.assert_allclose(sliding_nll(scorer, ids, 50, 10), prefix_nll(scorer, ids))


def test_the_last_tokens_are_the_same_at_every_length_and_special_tokens_stay_in_front() -> None:
    ids = np.random.default_rng(0).integers(0, 256, 100)
    scored = np.arange(100) % 3 > 0
    row = score_document(
        one_process_scorer(tiny_llama()),
        Document("a", ids, scored, num_leading=2),
        [30, 60, 100],
        Window(LAST, None, 20),
        4,
    )
    for total, length in zip(row["nll_sum"], [30, 60, 100], strict=True):
        context = np.concatenate([ids[:2], ids[100 - length + 2 :]])
        assert total == pytest.approx(nll_of(context)[-20:][scored[-20:]].sum(), rel=1e-5)
    assert row["num_scored"] == [scored[-20:].sum()] * 3
    assert row["bin_edges"] == [79, 84, 89, 94, 99]
    assert sum(row["bin_nll_sum"]) == pytest.approx(row["nll_sum"][-1])


def test_the_last_tokens_by_command_line(arguments: list[str], tmp_path: Path) -> None:
    assert perplexity.main([*arguments, "--window", "last", "--targets", "40"]) == 0
    points = summary_of(tmp_path / "out")["curves"]["tiny"]
    texts = [(tmp_path / "texts" / f"{number}.txt").read_text() for number in range(3)]
    for point in points:
        pieces = [np.array(tokenizer("bytes")(text)["input_ids"][:300]) for text in texts]
        nll = np.concatenate([nll_of(piece[-point["length"] :])[-40:] for piece in pieces])
        assert point["num_tokens"] == 120
        assert point["mean_nll"] == pytest.approx(nll.mean(), rel=1e-5)
    # With another longest length the last tokens would be others: not beside these.
    assert perplexity.main([*arguments, "--lengths", "64", "200", "--window", "last", "--targets", "40"]) == 2


def test_several_models_in_one_figure_and_resume(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perplexity.main([*arguments, "--labels", "before"])
    rows_file = tmp_path / "out" / "documents.jsonl"
    before = rows_file.read_text()
    other = str(save_tiny_model(tmp_path / "other", seed=1))
    both = [*arguments, "--model", arguments[1], other, "--labels", "before", "after"]
    assert perplexity.main(both) == 0
    assert rows_file.read_text().startswith(before)
    assert len(rows_file.read_text().splitlines()) == 6
    scores = summary_of(tmp_path / "out")["perplexity"]
    assert list(scores) == ["before", "after"]
    assert scores["before"]["64"] != scores["after"]["64"]
    monkeypatch.setattr(perplexity, "load_scorer", None)  # nothing is left to score
    assert perplexity.main(both) == 0
    assert perplexity.main(["--plot-only", "--output", str(tmp_path / "out")]) == 0
    assert summary_of(tmp_path / "out")["perplexity"] == scores


def test_a_model_trained_further_under_the_same_label_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    arguments = [*arguments, "--model", str(folder)]
    perplexity.main(arguments)
    tiny_llama(2, num_hidden_layers=1).save_pretrained(folder)
    assert perplexity.main(arguments) == 2
    assert "the weights of model model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "{tmp}/nowhere"], "does not exist"),
        (["--data", "{tmp}/empty"], "holds no file"),
        (["--lengths", "5000"], "no document of 5000 tokens, the longest has 90"),
        (["--stride", "10"], "a sliding window needs a stride"),
        (["--window", "sliding"], "a sliding window needs a stride"),
        (["--window", "sliding", "--stride", "65"], "--stride 65 jumps over tokens at length 64"),
        (["--window", "sliding", "--stride", "9", "--max-tokens", "99"], "less than the longest length 300"),
        (["--max-tokens", "99"], "--max-tokens is for"),
        (["--window", "last"], "--targets None: the last tokens need a number of them"),
        (["--targets", "9"], "--window prefix and --targets 9"),
        (["--window", "last", "--targets", "9", "--min-tokens", "99"], "--min-tokens is 99, and --window last"),
        (["--window", "last", "--targets", "64"], "--targets 64 leaves nothing before them at length 64"),
        (["--min-tokens", "9"], "less than the shortest length 64"),
        (["--labels", "a", "b"], "--labels names 2 models, --model 1"),
        (["--num-bins", "0"], "--num-bins is 0"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    flags: list[str],
    says: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(perplexity, "load_scorer", None)
    (tmp_path / "empty").mkdir()
    assert perplexity.main([*arguments, *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_means_are_weighted_by_tokens() -> None:
    common = {"lengths": [10, 20], "bin_edges": [0, 1]}
    rows = [
        {**common, "reached": [10, 20], "nll_sum": [9.0, 38.0], "num_scored": [9, 19], "bin_nll_sum": [4.0]},
        {**common, "reached": [10], "nll_sum": [0.0], "num_scored": [3], "bin_nll_sum": [2.0]},
    ]
    short, long = curve(rows, None)
    assert short["mean_nll"] == 9 / 12
    assert (long["mean_nll"], long["num_documents"], long["low"]) == (2.0, 1, None)
    assert by_position(rows) == [{"begin": 0, "end": 1, "mean_nll": 3.0, "num_tokens": 2}]


@pytest.mark.parametrize(("mode", "sp_degree"), [("data_parallel", 1), ("zigzag_ring_attn", 2)])
def test_two_ranks_score_as_one_process(
    mode: str, sp_degree: int, saved_model: str, tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_perplexity_on_ranks(0, 1, "data_parallel", 1, saved_model, str(tmp_path / "one"))
    ranks(2).run(run_perplexity_on_ranks, mode, sp_degree, saved_model, str(tmp_path / "two"))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["document_hash"] for row in two] == [row["document_hash"] for row in one]
    for left, right in zip(one, two, strict=True):
        assert right["nll_sum"] == pytest.approx(left["nll_sum"], rel=1e-5)
        assert right["num_scored"] == left["num_scored"] == [49, 100]
