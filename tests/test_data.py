"""`easyctx data`: which tokens end up in which rows."""

import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from easyctx.data.load import load_tokenised
from easyctx.data.sources import BadRecords, find_files, read_documents
from tests.data_helpers import (
    DOCUMENTS,
    byte_bpe,
    left_behind,
    make_corpus,
    run,
    save_marked_tokenizer,
    save_plain_tokenizer,
    stream,
    summary_of,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_plain_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_marked_tokenizer(tmp_path_factory.mktemp("marked"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


def test_rows_decode_to_the_joined_documents(corpus: Path, plain: str, tmp_path: Path, capsys) -> None:
    assert run(corpus, plain, tmp_path / "out") == 0
    joined = "".join(DOCUMENTS)
    expected = [i for d in DOCUMENTS for i in AutoTokenizer.from_pretrained(plain)(d)["input_ids"]]
    ids = stream(tmp_path / "out")
    assert ids == expected[: len(ids)]
    assert joined.startswith(AutoTokenizer.from_pretrained(plain).decode(ids))
    counts = summary_of(tmp_path / "out")["counts"]
    assert counts["tokens"] == len(expected) == counts["rows"] * 16 + counts["dropped_tokens"]
    assert (counts["documents"], counts["files"]) == (4, 3)
    printed = capsys.readouterr().out
    assert f"dropped: {counts['dropped_tokens']} tokens" in printed
    assert "nothing marks where one document ends" in printed
    assert left_behind(tmp_path) == []


def test_bos_and_eos_surround_every_document_and_borders_follow(corpus: Path, marked: str, tmp_path: Path) -> None:
    assert run(corpus, marked, tmp_path / "out", "--borders", "--pad-last", length=32) == 0
    rows = load_tokenised(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(marked)
    plain_ids = [tokenizer(d, add_special_tokens=False, truncation=False)["input_ids"] for d in DOCUMENTS]
    documents = [[0, *ids, 1] for ids in plain_ids]
    expected = [i for d in documents for i in d]
    padding = -len(expected) % 32
    assert padding > 0
    assert stream(tmp_path / "out")[: len(expected)] == expected
    assert stream(tmp_path / "out", "labels") == expected + [-100] * padding
    owner = np.repeat(np.arange(5), [*map(len, documents), padding]).reshape(-1, 32)
    np.testing.assert_array_equal(np.array(rows["document_ids"]), owner - owner[:, :1])
    assert rows.features["document_ids"].feature.dtype == rows.features["input_ids"].feature.dtype == "int32"
    assert summary_of(tmp_path / "out")["counts"]["padding_tokens"] == padding


def test_bos_and_eos_choices(corpus: Path, marked: str, plain: str, tmp_path: Path, capsys) -> None:
    assert run(corpus, marked, tmp_path / "bare", "--no-bos", "--no-eos") == 0
    assert {0, 1}.isdisjoint(stream(tmp_path / "bare"))
    assert run(corpus, plain, tmp_path / "x", "--bos") == 2
    assert "no BOS token" in capsys.readouterr().err
    same = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(special_tokens=("<|end|>",)), bos_token="<|end|>", eos_token="<|end|>"
    )
    same.save_pretrained(tmp_path / "same")
    assert run(corpus, str(tmp_path / "same"), tmp_path / "once") == 0
    chosen = summary_of(tmp_path / "once")["tokenizer"]
    assert (chosen["bos_id"], chosen["eos_id"]) == (None, 0)


def test_slow_tokenizer(corpus: Path, tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    assert not AutoTokenizer.from_pretrained(tmp_path / "byt5").is_fast
    assert run(corpus, str(tmp_path / "byt5"), tmp_path / "out", "--pad-last") == 0
    ids = np.array([i for d in DOCUMENTS for i in [*(b + 3 for b in d.encode()), 1]])
    np.testing.assert_array_equal(stream(tmp_path / "out")[: len(ids)], ids)


def test_processes_give_the_same_rows(
    corpus: Path, marked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyctx.data.parallel.BATCH_PIECES", 1)
    assert run(corpus, marked, tmp_path / "one") == 0
    assert run(corpus, marked, tmp_path / "two", "--num-proc", "2") == 0
    assert stream(tmp_path / "one") == stream(tmp_path / "two")


def test_text_is_kept_but_for_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\n two \n")
    read = [0]

    def count(number: int) -> None:
        read[0] += number

    bad = BadRecords(skip=False)
    [document] = read_documents(find_files([str(tmp_path)]), text_field="text", bad=bad, on_bytes=count)
    assert document.text == "one\r\n two \n"
    assert read[0] == (tmp_path / "x.txt").stat().st_size


def test_no_network_and_no_cache(corpus: Path, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert run(corpus, plain, tmp_path / "out") == 0
    assert not (tmp_path / "cache").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from easyctx import cli\n"
        "try: cli.main(['data', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--seq-length" in done.stdout
