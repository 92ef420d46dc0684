"""`easyctx data`: every mistake is named, and nothing half-written is left or lost."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from easyctx.data import build
from easyctx.data.load import load_tokenised
from tests.data_helpers import (
    TEXTS,
    left_behind,
    make_corpus,
    run,
    save_plain_tokenizer,
    stream,
    summary_of,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_plain_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


BAD_LINES = {
    b'{"text": "cut off': "broken JSON",
    b'{"other": 1}': "no field 'text'",
    b'{"text": 7}': "field 'text' is int, not a string",
    b'["text"]': "a JSON list where an object is needed",
    b'{"text": "\xff"}': "not UTF-8 (byte 0xff at offset 10)",
    b'{"text": " \\n"}': "empty document",
    b'{"text": "\\ud800"}': "a lone surrogate",
    b"[" * 200_000: "broken JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=[*map(str, range(len(BAD_LINES)))])
def test_a_bad_line_is_named(
    line: bytes, reason: str, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert run(source, plain, tmp_path / "out", length=2) == 2
    error = capsys.readouterr().err
    assert f"{source}:2: {reason}" in error
    assert "--skip-bad" in error
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.jsonl"]


def test_skip_bad_counts_and_names(plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = json.dumps({"text": TEXTS[2]}).encode()
    (folder / "lines.jsonl").write_bytes(b"\n".join([*BAD_LINES, good]))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "none.jsonl").write_bytes(b"\n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "cut.txt.gz").write_bytes(gzip.compress(TEXTS[2].encode())[:-12])
    (folder / "no.jsonl.gz").write_bytes(b"not gzip")
    assert run(folder, plain, tmp_path / "out", "--skip-bad") == 0
    summary = summary_of(tmp_path / "out")
    assert summary["counts"]["bad_records"] == len(BAD_LINES) + 5
    assert summary["counts"]["documents"] == 1
    printed = capsys.readouterr().out
    assert f"skipped: {len(BAD_LINES) + 5} bad records" in printed
    for name in ("empty.txt", "none.jsonl", "latin.txt", "cut.txt.gz", "no.jsonl.gz", "lines.jsonl:8"):
        assert f"{folder / name}: " in printed


def test_settings_are_refused_before_work_starts(
    corpus: Path, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*args: object, **kwargs: object) -> None:
        raise AssertionError("documents were read")

    monkeypatch.setattr(build, "fill_store", no_work)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    out = tmp_path / "out"

    def error_of(*arguments: object, **keywords: int | str) -> str:
        assert run(*arguments, **keywords) == 2
        return capsys.readouterr().err

    assert "does not exist" in error_of(tmp_path / "gone", plain, out)
    assert "no supported file" in error_of(corpus / "notes.md", plain, out)
    assert "reached twice" in error_of(corpus, plain, out, also=str(corpus / "a.txt"))
    assert "--seq-length 1" in error_of(corpus, plain, out, length=1)
    assert "--num-proc 0" in error_of(corpus, plain, out, "--num-proc", "0")
    assert "not empty" in error_of(corpus, plain, tmp_path / "full")
    assert "'mine'" in error_of(corpus, plain, tmp_path / "full", "--overwrite")
    assert "is a file" in error_of(corpus, plain, corpus / "a.txt")
    assert "is below" in error_of(corpus, plain, corpus / "a.txt" / "rows")
    assert "no such folder" in error_of(corpus, str(tmp_path / "no_tokenizer"), out)
    assert "does not load" in error_of(corpus, str(tmp_path / "full"), out)
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    assert not out.exists()
    assert left_behind(tmp_path) == []


def test_less_than_one_row_is_an_error(corpus: Path, plain: str, tmp_path: Path, capsys) -> None:
    assert run(corpus, plain, tmp_path / "out", length=100_000) == 2
    assert "less than one row of --seq-length 100000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_our_dataset_only(corpus: Path, plain: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(corpus, plain, out) == 0
    assert run(corpus, plain, out, length=8) == 2
    assert run(corpus, plain, out, "--overwrite", length=8) == 0
    assert len(load_tokenised(out)[0]["input_ids"]) == 8
    (out / "thesis.txt").write_text("precious")
    assert run(corpus, plain, out, "--overwrite") == 2
    assert (out / "thesis.txt").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text("{}")
    assert run(corpus, plain, tmp_path / "other", "--overwrite") == 2


@pytest.mark.parametrize("where", ["write", "save", "rename"])
def test_an_interrupted_run_leaves_nothing_and_keeps_the_old(
    where: str, corpus: Path, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(corpus, plain, out) == 0
    before = stream(out)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    if where == "write":
        monkeypatch.setattr(build.RowWriter, "add", interrupt)
    elif where == "save":
        monkeypatch.setattr(datasets.Dataset, "save_to_disk", interrupt)
    else:
        rename = os.rename
        # The first rename puts the old folder aside, the second is the one that is cut off.
        moves = iter([rename, interrupt, rename])
        monkeypatch.setattr("easyctx.data.folder.os.rename", lambda *paths: next(moves)(*paths))
    assert run(corpus, plain, out, "--overwrite", length=8) == 130
    assert stream(out) == before
    if where != "rename":
        assert run(corpus, plain, tmp_path / "new") == 130
        assert not (tmp_path / "new").exists()
    assert left_behind(tmp_path) == []
