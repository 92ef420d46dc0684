"""Perplexity: exact by length from one pass, sliding windows, documents, resume, several processes."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyctx.data.tokenised import fingerprint
from easyctx.evals import perplexity
from easyctx.evals.documents import Document, check_data, read_documents
from easyctx.evals.perplexity import with_labels
from easyctx.evals.perplexity_report import by_position, curve
from easyctx.evals.perplexity_windows import LAST, PREFIX, SLIDING, Window, prefix_nll, score_document, sliding_nll
from tests.eval_helpers import (
    encoder,
    english,
    one_process_scorer,
    run_perplexity_on_ranks,
    save_tiny_model,
    tiny_llama,
    tokenizer,
)
from tests.pool import RankPool


def nll_of(ids: np.ndarray) -> np.ndarray:
    """Brute force: NLL of ids[1:] from one forward over exactly these tokens."""
    tokens = torch.from_numpy(ids)[None]
    with torch.no_grad():
        logprob = tiny_llama()(tokens).logits.double().log_softmax(-1)
    return -logprob[0, :-1].gather(-1, tokens[0, 1:, None]).squeeze(-1).numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def arguments(model: str, tmp_path: Path) -> list[str]:
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(english()[5000 * number :][:900])
    (tmp_path / "texts" / "short.txt").write_text("too short")
    data, out = str(tmp_path / "texts"), str(tmp_path / "out")
    return ["--model", model, "--data", data, "--lengths", "64", "300", "--force", "--output", out]


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


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


def test_documents_of_every_kind_are_the_same_tokens(tmp_path: Path) -> None:
    import datasets

    text = english()[:600]
    ids = tokenizer("metaspace_bpe")(text)["input_ids"]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"input_ids": ids}) + "\n")
    datasets.Dataset.from_dict({"input_ids": [ids]}).save_to_disk(str(tmp_path / "rows"))
    for data, number in (("a.txt", 1), ("b.jsonl", 2), ("rows", 1)):
        documents = read_documents(
            tmp_path / data, encoder("metaspace_bpe"), max_tokens=90, min_tokens=50, max_documents=None
        )
        assert [document.ids.tolist() for document in documents] == [ids[:90]] * number
        assert ids[0] == 1


def test_split_makes_documents_of_one_long_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(english()[:5000])
    documents = read_documents(
        tmp_path / "a.txt", encoder("unigram"), max_tokens=100, min_tokens=100, max_documents=5, split=True
    )
    whole = tokenizer("unigram")(english()[:5000])["input_ids"][1:]
    assert [document.ids[0] for document in documents] == [1] * 5
    assert [token for document in documents for token in document.ids[1:].tolist()] == whole[: 5 * 99]
    assert len({document.name for document in documents}) == 5


def test_tokens_of_another_vocabulary_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [*range(256), 256, *range(100)]}) + "\n")
    assert perplexity.main([*arguments, "--data", str(tmp_path / "rows.jsonl")]) == 2
    assert "holds token 256, but" in capsys.readouterr().err


def test_rows_that_another_tokenizer_made_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = tmp_path / "rows"
    datasets.Dataset.from_dict({"input_ids": [[*range(200)] * 2]}).save_to_disk(str(rows))
    summary = {"made_by": "easyctx data", "tokenizer": {"name": "llama", "vocabulary_size": 32000}}
    (rows / "easyctx_data.json").write_text(json.dumps(summary))
    assert perplexity.main([*arguments, "--data", str(rows)]) == 2
    assert re.search("error: .*with llama, which knows 32000 tokens, .* knows 256", capsys.readouterr().err)
    own = fingerprint(tokenizer("bytes"))
    for card in (rows, tmp_path):  # beside the rows, or beside the splits of which they are one
        summary["tokenizer"] = {"name": "other", "vocabulary_size": 256, "fingerprint": "0123456789abcdef"}
        (card / "easyctx_data.json").write_text(json.dumps(summary))
        assert perplexity.main([*arguments, "--data", str(rows)]) == 2
        error = capsys.readouterr().err
        assert re.search(f"error: .*with other .vocabulary 0123456789abcdef., .* vocabulary {own}", error)
        (card / "easyctx_data.json").unlink()
    summary["tokenizer"] = {"name": "same", "vocabulary_size": 256, "fingerprint": own}
    (rows / "easyctx_data.json").write_text(json.dumps(summary))
    assert perplexity.main([*arguments, "--data", str(rows)]) == 0


def test_packed_rows_are_their_documents_and_no_padding(tmp_path: Path) -> None:
    import datasets

    ids = list(range(1, 21))
    columns = {"input_ids": [ids, ids], "document_ids": [[0] * 8 + [1] * 8 + [2] * 4, [0] * 20]}
    columns["labels"] = [[*ids[:16], *[-100] * 4], [*[-100] * 5, *ids[5:]]]
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "rows"))
    documents = read_documents(tmp_path / "rows", encoder("bytes"), max_tokens=30, min_tokens=2, max_documents=None)
    assert [document.ids.tolist() for document in documents] == [ids[:8], ids[8:16], ids]
    assert [document.name for document in documents] == ["rows:0.0", "rows:0.1", "rows:1"]
    assert [document.scored is None for document in documents] == [True, True, False]


def test_a_row_without_a_label_in_what_is_read_of_it_is_left_out() -> None:
    ids = np.arange(60)
    late, early = Document("late", ids, ids == 50), Document("early", ids, ids == 20)
    assert with_labels([late, early], [30, 90], Window(PREFIX)) == [early]
    assert with_labels([late, early], [30, 60], Window(PREFIX)) == [late, early]
    assert with_labels([late, early], [30, 90], Window(SLIDING, stride=9)) == [late, early]
    assert with_labels([late, early], [30, 90], Window(LAST, targets=10)) == [late]
    with pytest.raises(ValueError, match=r"shortest row's 60 tokens these are 29\): give more --lengths"):
        with_labels([late], [30, 90], Window(PREFIX))


def test_of_rows_with_labels_the_labelled_tokens_are_scored(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    ids = np.random.default_rng(0).integers(0, 256, (2, 70))
    labels = ids.copy()
    labels[0, :66], labels[1, 40:50] = -100, -100
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    rows.save_to_disk(str(tmp_path / "rows"))
    asked = ["--data", str(tmp_path / "rows"), "--lengths", "64", "70", "--num-bins", "3"]
    assert perplexity.main([*arguments, *asked]) == 0
    assert "2 documents of 140 tokens, 76 of them without a label" in capsys.readouterr().out
    summary = summary_of(tmp_path / "out")
    nll = [nll_of(row) for row in ids]
    scored = [row[1:] != -100 for row in labels]
    short, long = summary["curves"]["tiny"]
    assert (short["num_documents"], short["num_tokens"], long["num_tokens"]) == (1, 53, 4 + 59)
    want = sum(each[which].sum() for each, which in zip(nll, scored, strict=True)) / 63
    assert long["mean_nll"] == pytest.approx(want, rel=1e-5)
    assert short["mean_nll"] == pytest.approx(nll[1][:63][scored[1][:63]].mean(), rel=1e-5)
    bins = summary["by_position"]["tiny"]
    assert [each["num_tokens"] for each in bins] == [23, 23 - 7, 23 - 3 + 4]
    assert sum(each["mean_nll"] * each["num_tokens"] for each in bins) == pytest.approx(63 * want, rel=1e-5)


@pytest.mark.parametrize(
    ("splits", "flags", "read"),
    [
        (["train", "validation"], [], "validation"),
        (["train", "validation"], ["--data-split", "train"], "train"),
        (["test"], [], "test"),
        (["train", "test"], [], None),
        (["train", "validation"], ["--data-split", "test"], None),
    ],
)
def test_the_split_that_is_scored(splits: list[str], flags: list[str], read: str | None, tmp_path: Path) -> None:
    import datasets

    rows = {name: datasets.Dataset.from_dict({"input_ids": [[number] * 9]}) for number, name in enumerate(splits)}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "rows"))
    asked = flags[1] if flags else None
    if read is None:
        with pytest.raises(ValueError, match=f"splits .*{', '.join(splits)}.*--data-split"):
            check_data(tmp_path / "rows", asked)
        return
    assert check_data(tmp_path / "rows", asked) == read
    [document] = read_documents(
        tmp_path / "rows", encoder("bytes"), max_tokens=9, min_tokens=2, max_documents=None, data_split=read
    )
    assert document.ids.tolist() == [splits.index(read)] * 9


def test_a_split_of_what_has_none_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perplexity.main([*arguments, "--data-split", "train"]) == 2
    assert re.search("error: .*has no split 'train', it has none", capsys.readouterr().err)


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
    mode: str, sp_degree: int, model: str, tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_perplexity_on_ranks(0, 1, "data_parallel", 1, model, str(tmp_path / "one"))
    ranks(2).run(run_perplexity_on_ranks, mode, sp_degree, model, str(tmp_path / "two"))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["document_hash"] for row in two] == [row["document_hash"] for row in one]
    for left, right in zip(one, two, strict=True):
        assert right["nll_sum"] == pytest.approx(left["nll_sum"], rel=1e-5)
        assert right["num_scored"] == left["num_scored"] == [49, 100]
