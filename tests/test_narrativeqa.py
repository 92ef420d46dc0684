"""NarrativeQA: rows merged by id, documents cut exactly, resume, scoring of predictions alone, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from easyctx.evals.tasks import narrativeqa
from easyctx.evals.tasks.narrativeqa_data import groups_of, read_examples
from easyctx.evals.tasks.shell import PromptShell
from tests.eval_helpers import TOKENIZERS, encoder, english, save_tiny_model, tokenizer
from tests.task_helpers import Generators, fake_generators, rows_of, summary_of, write_jsonl

INTRO = "You are given a story and a question.\n\nStory:\n"
SEPARATOR = "... [The rest is left out]\n\n"


def row(number: int, output: str | None, story: int = 0, **changes: Any) -> dict[str, Any]:
    document = english()[2000 * story : 2000 * story + 1500]
    query = f"Question:\nWho is number {number}?\n\nAnswer:\n"
    start = len(INTRO) + len(document)
    return {
        "id": f"q{number}",
        "pid": f"q{number}_0",
        "input": INTRO + document + "\n\n" + query,
        "output": output,
        "document_start_index": len(INTRO),
        "document_end_index": start,
        "query_start_index": start + 2,
        "query_end_index": start + 2 + len(query),
        "truncation_seperator": SEPARATOR,
    } | changes


ROWS = [row(0, "The old man"), row(1, "a dog", story=1), row(0, "an old man called Bo"), row(2, "nobody")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192))


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> Generators:
    return fake_generators(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "validation.jsonl", ROWS)


def reply(prompt: str) -> str:
    number = int(re.findall(r"number (\d)", prompt)[-1])
    return ["old man", "a dog.", "somebody"][number]


def test_references_are_merged_by_id_and_questions_by_document(data: Path) -> None:
    examples = read_examples(data)
    assert [(example.id, len(example.references)) for example in examples] == [("q0", 2), ("q1", 1), ("q2", 1)]
    assert [group.items for group in groups_of(examples, None, 64)] == [("q0", "q2"), ("q1",)]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_long_document_is_cut_to_the_token(name: str, data: Path) -> None:
    example = read_examples(data)[0]
    shell = PromptShell(encoder(name))
    [group] = groups_of([example], 417, 20)
    [question] = group.build(shell)
    assert len(question.ids) == 417 - 20
    assert question.labels["cut"]
    cuts = (example.text[: len(INTRO) + kept] + SEPARATOR + example.query for kept in range(1500))
    assert any(tokenizer(name)(text)["input_ids"] == question.ids.tolist() for text in cuts)
    [group] = groups_of([example], 50_000, 20)
    [question] = group.build(shell)
    assert question.ids.tolist() == tokenizer(name)(example.text)["input_ids"]
    assert not question.labels["cut"]


def test_a_run_scores_by_the_best_reference(model: str, data: Path, tmp_path: Path, generators: Generators) -> None:
    out = tmp_path / "out"
    generators.reply = reply
    arguments = ["--model", model, "--data", str(data), "--output", str(out)]
    assert narrativeqa.main(arguments) == 0
    assert {each["item"]: each["score"] for each in rows_of(out)} == {"q0": 1.0, "q1": 1.0, "q2": 0.0}
    assert summary_of(out)["models"]["tiny"]["mean"] == pytest.approx(2 / 3)
    assert [call["questions"] for call in sorted(generators[0].calls, key=lambda call: call["questions"])] == [1, 2]
    predictions = json.loads((out / "predictions_tiny.json").read_text())
    assert predictions == {"q0": "old man", "q1": "a dog.", "q2": "somebody"}
    (out / "scores.png").unlink()
    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[:1]))
    assert narrativeqa.main(arguments) == 0
    assert len(generators) == 2
    assert len(generators[1].calls) == (1 if lines[0].find('"q1"') > 0 else 2)
    assert (out / "scores.png").exists()


def test_predictions_are_scored_without_a_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "claude2.json"
    file.write_text(json.dumps({"q0": "old man called Bo", "q1": "cat dog", "q2": ""}))
    assert narrativeqa.main(["--score-only", str(file), "--data", str(data)]) == 0
    assert f"narrativeqa claude2: {(1 + 2 / 3) / 3:.4f}" in capsys.readouterr().out


def test_our_own_table_scores_the_same_again(model: str, data: Path, tmp_path: Path, generators: Generators) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    generators.reply = reply
    narrativeqa.main(["--model", model, "--data", str(data), "--output", str(out)])
    for file in ("answers.csv", "answers.jsonl", "predictions_tiny.json"):
        flags = ["--score-only", str(out / file), "--data", str(data), "--labels", "tiny", "--output", str(again)]
        assert narrativeqa.main(flags) == 0
        assert summary_of(again)["models"]["tiny"]["mean"] == summary_of(out)["models"]["tiny"]["mean"]


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        (ROWS, ["--max-length", "100"], "--max-length 100, 64 of them .* question q\\d: .* at least"),
        ([row(0, None)], [], "1 ids have no output"),
        ([row(0, "x", query_start_index=10)], [], "do not fit"),
        ([row(0, "x"), row(0, "y", story=1)], [], "line 2: id q0 came before with another input"),
        ([{"id": "q0"}], [], "has none of input"),
        ([row(0, "x", input=[1, 2, 3])], [], "line 1: input must be a text, it is a list"),
        ([], [], "holds no example"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    rows: list[dict[str, Any]],
    flags: list[str],
    says: str,
    model: str,
    tmp_path: Path,
    generators: Generators,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert narrativeqa.main(["--model", model, "--data", str(data), "--output", str(tmp_path / "out"), *flags]) == 2
    assert re.search(f"^error: .*{says}", capsys.readouterr().err, re.MULTILINE)
    assert not generators
    assert not (tmp_path / "out").exists()
