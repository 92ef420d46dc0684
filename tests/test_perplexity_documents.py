"""What perplexity is of: documents of every kind, packed rows, rows with labels, splits, other vocabularies."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from easyctx.data.tokenised import fingerprint
from easyctx.evals import perplexity
from easyctx.evals.documents import Document, check_data, read_documents
from easyctx.evals.perplexity import with_labels
from easyctx.evals.perplexity_windows import LAST, PREFIX, SLIDING, Window
from tests.eval_helpers import (
    encoder,
    english,
    nll_of,
    perplexity_arguments,
    tokenizer,
)
from tests.task_helpers import summary_of


@pytest.fixture
def arguments(saved_model: str, tmp_path: Path) -> list[str]:
    return perplexity_arguments(saved_model, tmp_path)


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


def test_rows_of_a_tokenizer_with_fewer_tokens_are_taken_where_ids_agree(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's tokenizer has one more, such as to pad with; without a fingerprint nothing shows the others' ids."""
    import datasets

    rows, whole = tmp_path / "rows", tokenizer("bytes")
    datasets.Dataset.from_dict({"input_ids": [[*range(200)] * 2]}).save_to_disk(str(rows))
    recorded = {"name": "base", "vocabulary_size": 255, "fingerprint": fingerprint(whole, below=255)}
    for change, status, message in (
        ({}, 0, ""),
        ({"fingerprint": "0123456789abcdef"}, 2, "up to id 254, in which tokens have other ids"),
        ({"fingerprint": None}, 2, "with base, which knows 255 tokens, .* knows 256"),
        ({"vocabulary_size": 257}, 2, "with base, which knows 257 tokens, .* knows 256"),
    ):
        summary = {"made_by": "easyctx data", "tokenizer": recorded | change}
        (rows / "easyctx_data.json").write_text(json.dumps(summary))
        assert perplexity.main([*arguments, "--data", str(rows)]) == status, change
        assert re.search(message, capsys.readouterr().err)


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
