"""The comparison with published scores, on a file of the published form that is made here."""

import json
from pathlib import Path

import pytest

ANSWERS = [
    ("2416", "<2416> <46,323,567,983", "983"),
    ("12602", " <12602>.  Now the record is over", "12602"),
    ("31934", "no number", "-1"),
    ("456", "The <REGISTER_CONTENT> in line a-b is 456.", "456"),
]


def write(folder: Path, last: str) -> Path:
    file = folder / "model" / "200_response.txt"
    file.parent.mkdir(exist_ok=True)
    lines = [f"Label: {label}, Predict: {said}, Parsed: {read}, prompt length: 99" for label, said, read in ANSWERS]
    file.write_text("\n".join([*lines, last]))
    return file


@pytest.mark.parametrize(("last", "status"), [("Accuracy: 0.5", 0), ("Accuracy: 0.75", 1)])
def test_a_score_is_the_published_one_to_the_digit_or_the_run_fails(
    last: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import published_scores

    assert published_scores.main([str(write(tmp_path, last)), "--output", str(tmp_path)]) == status
    assert "model/200_response.txt" in capsys.readouterr().out
    for wrong, says in (
        ("Label: x", "is no 'Accuracy: SHARE'"),
        ("strange\nAccuracy: 0.5", "line 5 is not of the form"),
    ):
        with pytest.raises(ValueError, match=says):
            published_scores.of_longchat(write(tmp_path, wrong))


def test_f1_is_compared_with_as_many_digits_as_were_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import published_scores

    file = tmp_path / "qa.pred.jsonl"
    rows = [{"gt": "a cat", "m_pred": "The cat!"}, {"gt": "cat", "m_pred": "cat dog"}, {"gt": "x", "m_pred": "y"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for published, same in (("55.56", True), ("55.55", False), ("55.6", True)):
        row = published_scores.of_leval(file, published)
        assert (row["same"], row["predictions"]) == (same, 3)
    file.write_text(json.dumps({"gt": "x"}))
    with pytest.raises(ValueError, match=r"line 1 has no gt or no \.\.\._pred; it has gt"):
        published_scores.of_leval(file, "1.0")
