"""Loading tokenised rows for the train loop, and refusing wrong ones."""

from pathlib import Path

import datasets
import pytest

from easyctx.capability import check_model_path
from easyctx.data.load import check_rows, load_tokenised


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
    for number_of_shards in (None, 1):  # without any shard `datasets` cannot load what it saved
        empty = tmp_path / f"empty{number_of_shards}"
        rows.select([]).save_to_disk(empty, num_shards=number_of_shards)
        with pytest.raises(ValueError, match="0 rows"):
            load_tokenised(empty)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no dataset"):
        load_tokenised(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no local folder .*gone, and it is no hub name"):
        load_tokenised(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rows/64k", "the folder rows here holds 32k"),
        ("data/64k", "data/ is taken for a folder"),
        ("some/rows.jsonl", "rows.jsonl is taken for a file"),
        ("./64k", "it is no hub name"),
        ("a/b/64k", "it is no hub name"),
    ],
)
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows" / "32k").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=rf"there is no local folder {tmp_path}/.*64k|rows.jsonl") as error:
        load_tokenised(name)
    assert says in str(error.value)
    with pytest.raises(ValueError, match="is no folder here, and") as error:
        check_model_path(name)
    assert says in str(error.value)


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
