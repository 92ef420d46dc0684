"""Where documents can come from, and in what order and number they are read."""

import json
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from easyctx.data.load import load_tokenised
from easyctx.data.parallel import choose_num_proc
from tests.data_helpers import (
    DOCUMENTS,
    make_corpus,
    run,
    save_marked_tokenizer,
    save_plain_tokenizer,
    stream,
    summary_of,
)

LONG = [f"{text} {number}" for number, text in enumerate(DOCUMENTS * 10)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_plain_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_marked_tokenizer(tmp_path_factory.mktemp("marked"))


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_parquet_and_saved_datasets_give_what_jsonl_gives(plain: str, tmp_path: Path) -> None:
    records = [{"text": text, "n": 1} for text in LONG]
    jsonl(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "b.parquet", "saved"):
        assert run(tmp_path / name, plain, tmp_path / f"out_{name}") == 0
    assert stream(tmp_path / "out_a.jsonl") == stream(tmp_path / "out_b.parquet") == stream(tmp_path / "out_saved")


def test_a_broken_parquet_file_is_named(plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.parquet").write_bytes(b"PAR1 not really")
    jsonl(tmp_path / "in" / "y.jsonl", [{"text": text} for text in LONG])
    assert run(tmp_path / "in", plain, tmp_path / "out") == 2
    assert "x.parquet: broken Parquet file" in capsys.readouterr().err
    assert run(tmp_path / "in", plain, tmp_path / "out", "--skip-bad") == 0
    assert summary_of(tmp_path / "out")["counts"]["bad_records"] == 1


def test_hub_datasets_are_streamed(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    read = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        if name == "org/gone":
            raise datasets.exceptions.DatasetNotFoundError("not on the Hub")
        assert (name, config, split, streaming) == ("org/name", "en", "dev", True)

        def rows():
            for number in range(100_000):
                read.append(number)
                yield {"body": LONG[number % len(LONG)]}

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = dict(path="org/name", config="en", split="dev", text_field="body", max_tokens=3000)
    (tmp_path / "mix.json").write_text(json.dumps({"sources": [source]}))
    assert run("--mix", plain, tmp_path / "out", also=str(tmp_path / "mix.json")) == 0
    counts = summary_of(tmp_path / "out")["counts"]
    assert 3000 <= counts["tokens"] < 3400
    # No more than a few batches of pieces ahead of what is written.
    assert len(read) < 20_000
    assert run("org/gone", plain, tmp_path / "none") == 2
    assert "as a hub dataset (split 'train') it does not load: not on the Hub" in capsys.readouterr().err


def test_tokenised_folders_are_taken_apart_into_documents(marked: str, tmp_path: Path) -> None:
    """Packed rows as a source give the same documents as their text."""
    corpus = make_corpus(tmp_path / "corpus")
    assert run(corpus, marked, tmp_path / "rows", "--pack", length=512) == 0
    assert run(tmp_path / "rows", marked, tmp_path / "again") == 0
    assert run(corpus, marked, tmp_path / "direct") == 0
    again, direct = summary_of(tmp_path / "again"), summary_of(tmp_path / "direct")
    assert again["read"] == direct["read"]
    assert sorted(stream(tmp_path / "again")) == sorted(stream(tmp_path / "direct"))
    # Padding is no document, and what was not to be learnt stays so.
    assert "labels" not in load_tokenised(tmp_path / "again").column_names
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "loss_mask": [[0, 0, 1, 1]]})
    rows.save_to_disk(tmp_path / "masked")
    assert run(tmp_path / "masked", marked, tmp_path / "kept", length=4) == 0
    assert stream(tmp_path / "kept") == [5, 6, 7, 8]
    assert stream(tmp_path / "kept", "labels") == [-100, -100, 7, 8]


def test_rows_whose_response_is_cut_away(marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[*range(5, 21)]], "loss_mask": [[0] * 8 + [1] * 8]})
    rows.save_to_disk(tmp_path / "masked")
    assert run(tmp_path / "masked", marked, tmp_path / "out", length=16) == 0
    assert run(tmp_path / "masked", marked, tmp_path / "short", length=4) == 2
    assert "row 0 would have no token to learn" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()


def test_memory_does_not_grow_with_the_text(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("parallel.BATCH_CHARACTERS", 1 << 14),
        ("rows.FLUSH_TOKENS", 1 << 13),
        ("build.READ_TOKENS", 1 << 13),
    ):
        monkeypatch.setattr(f"easyctx.data.{name}", value)
    peaks = []
    assert run(make_corpus(tmp_path / "corpus"), plain, tmp_path / "first") == 0  # imports
    for times in (1, 6):
        source = jsonl(tmp_path / f"{times}.jsonl", [{"text": text * 20} for text in LONG * times])
        tracemalloc.start()
        assert run(source, plain, tmp_path / f"out{times}", "--pack", "--num-proc", "1", "--overwrite", length=512) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    tokens = summary_of(tmp_path / "out6")["counts"]["tokens"]
    assert 4 * tokens > 0.25 * peaks[0]  # it would show if they were kept
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_another_tokenizers_rows_are_refused(
    plain: str, marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    assert run(corpus, marked, tmp_path / "rows") == 0
    capsys.readouterr()
    assert run(tmp_path / "rows", plain, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert f"was tokenised with {marked} (vocabulary" in captured.err
    assert "tokenising" not in captured.err  # before any work
    for ids, problem in (([1, 70000], "token id 70000, outside the tokenizer's vocabulary"), ([-1, 2], "token id -1")):
        folder = tmp_path / str(ids[1])
        datasets.Dataset.from_dict({"input_ids": [[1, 2], ids]}).save_to_disk(folder)
        assert run(folder, plain, tmp_path / "out", length=2) == 2
        captured = capsys.readouterr()
        assert f"{folder}:1: {problem}" in captured.err
        assert "does not record its tokenizer" in captured.out
    assert not (tmp_path / "out").exists()


def test_mixes_do_not_depend_on_processes(
    marked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("easyctx.data.parallel.BATCH_PIECES", 3)
    one, two = jsonl(tmp_path / "1.jsonl", [{"text": t} for t in LONG]), tmp_path / "2.jsonl"
    jsonl(two, [{"text": f"{t} of the other"} for t in LONG])
    for name, processes in (("a", "1"), ("b", "2")):
        arguments = ["--validation", "0.1", "--long-from", "60", "--long-share", "0.8", "--num-proc", processes]
        assert run(f"{one}:0.75", marked, tmp_path / name, *arguments, also=f"{two}:0.25") == 0
    for split in ("train", "validation"):
        rows = [load_tokenised(tmp_path / name, split)["input_ids"] for name in ("a", "b")]
        assert list(rows[0]) == list(rows[1])
    first, second = summary_of(tmp_path / "a")["sources"]
    assert first["share_of_training"] == pytest.approx(0.75, abs=0.02)
    assert first["share_of_long"]["train"] == pytest.approx(0.8, abs=0.03)
    assert first["validation"]["documents"] == second["validation"]["documents"] == 4
    assert "of the training tokens" in capsys.readouterr().out
    capsys.readouterr()
    assert run(tmp_path / "1.jsonl", marked, tmp_path / "a", "--overwrite") == 0
    assert not (tmp_path / "a" / "validation").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--long-from", "8"], "--long-from N and --long-share S go together"),
        (["--long-from", "8", "--long-share", "1.5"], "--long-share 1.5 is a share of the tokens"),
        (["--validation", "1"], "--validation 1 is a share of the documents"),
        (["--tokens", "4"], "--tokens 4 is less than one row of --seq-length 16"),
        (["--chat"], "--chat is for examples: give --sft too"),
        (["--pack", "--pad-last"], "--pad-last is for joined rows"),
        (["--mix", "mix.yaml"], "both name sources"),
    ],
)
def test_settings_that_cannot_be(
    arguments: list[str], message: str, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    assert run(corpus, plain, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_little_text_is_not_worth_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [choose_num_proc(size) for size in (0, 1 << 20, 1 << 27, 1 << 40, None)] == [1, 1, 4, 8, 8]


def test_a_source_named_twice(plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.Dataset.from_dict({"text": LONG}).save_to_disk(tmp_path / "saved")
    assert run(f"{tmp_path / 'saved'}:1", plain, tmp_path / "out", also=f"{tmp_path / 'saved'}:2") == 2
    assert "is named twice" in capsys.readouterr().err


def test_the_card_says_what_is_in_the_rows(marked: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    assert run(corpus, marked, tmp_path / "out", "--pack", length=200) == 0
    summary, text = summary_of(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    rows = load_tokenised(tmp_path / "out")
    labels = stream(tmp_path / "out", "labels")
    counts = summary["counts"]
    assert counts["rows"] == len(rows)
    assert counts["padding_tokens"] == labels.count(-100) > 0
    assert counts["tokens"] - counts["dropped_tokens"] == len(labels) - labels.count(-100)
    assert sum(map(sum, summary["lengths"]["train"])) == counts["tokens"]
    assert f"| train | 4 | {counts['tokens']:,} | {counts['rows']} |" in text
    assert summary["tokenizer"]["fingerprint"] in text
    assert (tmp_path / "out" / "document_lengths.png").read_bytes().startswith(b"\x89PNG")
