"""`easyctx data` and the loading of tokenised rows: settings, joins, borders, errors, nothing half-written."""

import gzip
import json
import random
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from easyctx import cli
from easyctx.data import build, pieces
from easyctx.data.load import check_rows, load_tokenised
from easyctx.data.sources import BadRecords, find_files, read_documents

TEXTS = ["The cat sat on the mat. ", "Ünïcode, 123 numbers\r\nand lines\n", "A third one; it's longer than both. " * 9]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_bpe(pattern: str | None = None, special_tokens: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE with no special token at all."""
    folder = str(tmp_path_factory.mktemp("plain"))
    PreTrainedTokenizerFast(tokenizer_object=byte_bpe()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE that adds BOS itself and has EOS."""
    folder = str(tmp_path_factory.mktemp("marked"))
    tokenizer = byte_bpe(special_tokens=("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)  # as left in many a tokenizer.json: must not cut documents
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two text files, one of them gzipped and below, and a JSONL file, which sorts between them."""
    folder = tmp_path / "corpus"
    (folder / "z").mkdir(parents=True)
    (folder / "a.txt").write_bytes(TEXTS[0].encode())
    lines = json.dumps({"text": TEXTS[1]}) + "\n\n" + json.dumps({"text": "\u2028" + TEXTS[0]}, ensure_ascii=False)
    (folder / "m.jsonl").write_bytes(lines.encode())
    (folder / "z" / "b.txt.gz").write_bytes(gzip.compress(TEXTS[2].encode()))
    (folder / "notes.md").write_text("not read")
    return folder


DOCUMENTS = [TEXTS[0], TEXTS[1], "\u2028" + TEXTS[0], TEXTS[2]]


def run(source: object, tokenizer: str, output: Path, *more: str, length: int = 16) -> int:
    command = ["data", str(source), "--tokenizer", tokenizer, "--output", str(output)]
    return cli.main([*command, "--seq-length", str(length), *more])


def summary_of(output: Path) -> dict:
    return json.loads((output / "easyctx_data.json").read_text(encoding="utf-8"))


def stream(output: Path, column: str = "input_ids") -> list[int]:
    return [value for row in load_tokenised(output)[column] for value in row]


def left_behind(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if "partial" in entry.name]


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


def test_bos_and_eos_surround_every_document_and_borders_follow(
    corpus: Path, marked: str, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("pattern", [None, LLAMA_3, QWEN, GPT_OSS], ids=["gpt2", "llama3", "qwen", "gpt-oss"])
def test_cut_documents_tokenise_as_whole_ones(pattern: str | None) -> None:
    tokenizer = byte_bpe(pattern)
    assert pieces.can_cut(tokenizer.to_str())
    rng = random.Random(0)
    atoms = ["the", "cat", "Mat", "it's", "don't", "12345", " ", "  ", "\n", "\r\n", ".", ",' ", "é", "e\u0301", "日本", "_"]
    text = "".join(rng.choice(atoms) + rng.choice([" ", "", " "]) for _ in range(4000))
    parts = list(pieces.cut(text, 20))
    assert len(parts) > 200
    assert "".join(parts) == text
    glued = [i for part in parts for i in tokenizer.encode(part).ids]
    assert glued == tokenizer.encode(text).ids


def test_only_safe_tokenizers_are_cut() -> None:
    def can_cut_with(**changes: object) -> bool:
        tokenizer = byte_bpe(LLAMA_3)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return pieces.can_cut(tokenizer.to_str())

    assert can_cut_with()
    assert not can_cut_with(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    assert not can_cut_with(pre_tokenizer=None)
    stretching = byte_bpe(LLAMA_3)
    stretching.add_special_tokens(["a b"])
    assert not pieces.can_cut(stretching.to_str())


BAD_LINES = {
    b'{"text": "cut off': "broken JSON",
    b'{"other": 1}': "no field 'text'",
    b'{"text": 7}': "is int, not a string",
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


def test_text_is_kept_but_for_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\n two \n")
    read = [0]

    def count(number: int) -> None:
        read[0] += number

    bad = BadRecords(skip=False)
    [document] = read_documents(find_files([str(tmp_path)]), text_field="text", bad=bad, on_bytes=count)
    assert document.text == "one\r\n two \n"
    assert read[0] == (tmp_path / "x.txt").stat().st_size


def test_settings_are_refused_before_work_starts(
    corpus: Path, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*args: object, **kwargs: object) -> None:
        raise AssertionError("documents were read")

    monkeypatch.setattr(build, "read_documents", no_work)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    out = tmp_path / "out"

    def error_of(*arguments: object, **keywords: int) -> str:
        assert run(*arguments, **keywords) == 2
        return capsys.readouterr().err

    assert "does not exist" in error_of(tmp_path / "gone", plain, out)
    assert "no supported file" in error_of(corpus / "notes.md", plain, out)
    assert "reached twice" in error_of(corpus, plain, out, str(corpus / "a.txt"))
    assert "--seq-length 1" in error_of(corpus, plain, out, length=1)
    assert "--num-proc 0" in error_of(corpus, plain, out, "--num-proc", "0")
    assert "not empty" in error_of(corpus, plain, tmp_path / "full")
    assert "'mine'" in error_of(corpus, plain, tmp_path / "full", "--overwrite")
    assert "is a file" in error_of(corpus, plain, corpus / "a.txt")
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
        import os

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


def test_no_network_and_no_cache(
    corpus: Path, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert run(corpus, plain, tmp_path / "out") == 0
    assert not (tmp_path / "cache").exists()


def test_load_tokenised(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "dict")
    assert len(load_tokenised(tmp_path / "dict")) == 2
    assert len(load_tokenised(str(tmp_path / "dict"), split="test")) == 1
    with pytest.raises(ValueError, match=r"no split 'dev'.*train, test"):
        load_tokenised(tmp_path / "dict", split="dev")
    rows.save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="no splits"):
        load_tokenised(tmp_path / "rows", split="test")
    rows.rename_column("input_ids", "tokens").save_to_disk(tmp_path / "named")
    with pytest.raises(ValueError, match=r"no input_ids column, its columns are tokens"):
        load_tokenised(tmp_path / "named")
    rows.select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="0 rows"):
        load_tokenised(tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no dataset"):
        load_tokenised(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no local folder .*gone, and it is no hub name"):
        load_tokenised(tmp_path / "gone")


def test_load_tokenised_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "org/gone":
            raise datasets.exceptions.DatasetNotFoundError("not on the Hub")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_tokenised("org/name") is rows
    with pytest.raises(ValueError, match=r"no local folder .*org/gone, and as a hub dataset .*not on the Hub"):
        load_tokenised("org/gone")
    assert asked == [("org/name", "train"), ("org/gone", "train")]


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_check_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyctx.data.load.SCAN_TOKENS", 6)  # several batches
    types = {"list": datasets.List, "large": datasets.LargeList}
    integer = datasets.Value("int32")
    feature = types[kind](integer) if kind in types else datasets.List(integer, length=3)
    features = datasets.Features({"input_ids": feature})
    good = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 9]]
    rows = datasets.Dataset.from_dict({"input_ids": good}, features=features)
    check_rows(rows, 3, 10)
    check_rows(rows, 2, 10)
    with pytest.raises(ValueError, match=r"row 3 .*token id 9.*vocabulary of 9 "):
        check_rows(rows, 3, 9)
    with pytest.raises(ValueError, match=r"row 0 .*token id 9"):
        check_rows(rows.select([3, 0]), 3, 9)
    with pytest.raises(ValueError, match=r"row 0, has 3 tokens, but --seq-length is 4"):
        check_rows(rows, 4, 10)
    negative = datasets.Dataset.from_dict({"input_ids": [*good, [1, -1, 2]]}, features=features)
    with pytest.raises(ValueError, match=r"row 4 .*token id -1"):
        check_rows(negative, 3, 10)
    if kind != "fixed":
        ragged = datasets.Dataset.from_dict({"input_ids": [*good, [1], [1, 2]]}, features=features)
        with pytest.raises(ValueError, match=r"row 4, has 1 tokens, but --seq-length is 3"):
            check_rows(ragged, 3, 10)


def test_check_rows_refuses_other_types() -> None:
    for values in ([[0.5, 1.0]], [[[1], [2]]], [1, 2], ["a"]):
        with pytest.raises(ValueError, match="list of integers"):
            check_rows(datasets.Dataset.from_dict({"input_ids": values}), 1, 10)
