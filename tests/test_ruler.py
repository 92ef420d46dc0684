"""RULER: prompts that solvers written apart can solve, exact lengths, scores, effective length, refusals."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from easyctx.evals.encoding import Encoded, TextEncoder
from easyctx.evals.tasks import ruler, ruler_draft
from easyctx.evals.tasks.questions import Question
from easyctx.evals.tasks.ruler_groups import Sources, group_of
from easyctx.evals.tasks.ruler_lists import zipf_counts
from easyctx.evals.tasks.ruler_qa import Collection, read_hotpotqa, read_squad
from easyctx.evals.tasks.ruler_tasks import TASKS, TEMPLATES, effective_length, weighted_average
from easyctx.evals.tasks.shell import PromptShell
from tests.eval_helpers import encoder, english, save_tiny_model, tokenizer
from tests.task_helpers import Generators, fake_generators, rows_of, summary_of, write_jsonl

PARAGRAPHS = [text for text in english().split("\n\n") if 80 < len(text) < 400][:60]
SQUAD = {
    "data": [
        {
            "title": f"article {first}",
            "paragraphs": [
                {
                    "context": text,
                    "qas": [
                        {"question": f"Which is {first} {at}?", "answers": [{"text": text[:12]}, {"text": text[:20]}]},
                        {"question": "Impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for at, text in enumerate(PARAGRAPHS[first : first + 6])
            ],
        }
        for first in range(0, 60, 6)
    ]
}
HOTPOT = [
    {
        "question": f"How so {i}?",
        "answer": PARAGRAPHS[i][:9],
        "context": [[f"T{k}", [PARAGRAPHS[k]]] for k in (i, i + 1)],
    }
    for i in range(0, 60, 2)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of the sources."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpot.json").write_text(json.dumps(HOTPOT))
    (folder / "essay.txt").write_text(english())
    paths = {"--haystack": "essay.txt", "--squad": "squad.json", "--hotpotqa": "hotpot.json"}
    return [each for flag, name in paths.items() for each in (flag, str(folder / name))]


@pytest.fixture(scope="module")
def collections(files: list[str]) -> dict[str, Collection]:
    return {"squad": read_squad(Path(files[3])), "hotpotqa": read_hotpotqa(Path(files[5]))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192))


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> Generators:
    return fake_generators(monkeypatch)


@cache
def shell(name: str) -> PromptShell:
    return PromptShell(encoder(name))


def build(task: str, length: int, sources: Sources, name: str = "byte_bpe", sample: int = 0) -> tuple[str, Question]:
    sources.longest = max(sources.longest, 8192)
    [question] = group_of(task, length, sample, sources, TASKS[task].max_new_tokens).build(shell(name))
    return tokenizer(name).decode(question.ids.tolist()), question


def solve(prompt: str) -> str:
    """Answers any of the prompts from their text alone, without the code that made them."""
    if asked := re.search(r"does the text give for (.*)\?", prompt):
        keys = re.split(", | and ", asked[1])
        return " ".join(value for key in keys for value in re.findall(rf"for {key} is: (\S+)\.", prompt))
    if asked := re.findall(r"Which variables have the value (\d+)", prompt):
        text = prompt[prompt.rindex("Variables are assigned") :]
        value: dict[str, str] = {}
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            value[name] = value.get(given, given)
        return " ".join(name for name, given in value.items() if given == asked[-1])
    if "numbered list" in prompt:
        words = re.findall(r"\d+\. ([a-z-]+)", prompt[prompt.rindex("numbered list") :])
        return " ".join(word for word, _ in Counter(words).most_common(10))
    if "coded words" in prompt:
        words = re.findall(r"\b[a-z]{6}\b", prompt.split("\n\n")[1])
        return " ".join(word for word, _ in Counter(words).most_common(3))
    number = int(re.findall(r"\d+", prompt[prompt.rindex("Question:") :])[0])
    at = int(re.findall(r"\d+", prompt[prompt.rindex("Question:") :])[-1]) if "Which is" in prompt else 0
    answer = PARAGRAPHS[number + at][:20]
    return answer if answer in prompt else "nothing"


@pytest.mark.parametrize("name", ["byte_bpe", "bytes", "metaspace_bpe"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_can_be_solved(task: str, name: str, collections: dict[str, Collection]) -> None:
    sources = Sources(TEMPLATES, 42, english(), collections)
    for length in (4096, 5003) if name == "byte_bpe" else (6007,):
        text, question = build(task, length, sources, name)
        assert len(question.ids) == length - TASKS[task].max_new_tokens
        if name == "bytes":
            assert len(text.encode()) == len(question.ids)
        solved = solve(text)
        if task.startswith("qa"):
            assert any(solved in reference or reference in solved for reference in question.references)
        else:
            assert set(solved.split()) == set(question.references)
        assert TASKS[task].score(" ".join(question.references), question.references) == 1.0


def test_what_is_hidden_is_what_nvidia_hides(collections: dict[str, Collection]) -> None:
    sources = Sources(TEMPLATES, 42, english(), collections)

    def needles(task: str) -> tuple[int, int, int]:
        text, question = build(task, 4096, sources)
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        return len({key for key, _ in found}), len(found), len(question.references)

    assert needles("niah_single_1") == needles("niah_single_2") == needles("niah_single_3") == (1, 1, 1)
    assert needles("niah_multikey_1") == (4, 4, 1)
    assert needles("niah_multivalue") == (1, 4, 4)
    assert needles("niah_multiquery") == (4, 4, 4)
    for task in ("niah_multikey_2", "niah_multikey_3"):
        keys, found, asked = needles(task)
        assert keys == found > 40
        assert asked == 1
    text, _ = build("cwe", 4096, sources)
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", text[text.rindex("numbered list") :])).values()
    assert sorted(counts)[-10:] == [30] * 10
    assert Counter(counts)[3] > 30
    assert len(build("vt", 4096, sources)[1].references) == 5


def test_a_samples_needles_do_not_depend_on_length_or_tokenizer(collections: dict[str, Collection]) -> None:
    sources = Sources(TEMPLATES, 42, english(), collections)
    for task in TASKS:
        small, big = (build(task, length, sources)[1] for length in (3800, 6000))
        assert small.references == big.references or task == "fwe"
        again = build(task, 3800, Sources(TEMPLATES, 42, english(), collections))[1]
        assert small.ids.tolist() == again.ids.tolist()
        other = build(task, 3800, sources, sample=1)[1]
        assert small.ids.tolist() != other.ids.tolist()


@pytest.mark.parametrize("task", ["cwe", "fwe", "qa_1", "vt", "niah_multikey_2"])
def test_a_long_prompt_is_tokenised_once(
    task: str, collections: dict[str, Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, tokenised = Sources(TEMPLATES, 42, english(), collections), []
    original = TextEncoder.encode

    def spy(self: TextEncoder, text: str) -> Encoded:
        tokenised.append(len(text))
        return original(self, text)

    monkeypatch.setattr(TextEncoder, "encode", spy)
    monkeypatch.setattr(ruler_draft, "STRETCH", 512)  # shorter, as the prompt is
    monkeypatch.setattr(ruler_draft, "LONG", 10_000)
    text, question = build(task, 30_000, sources)
    assert len(question.ids) == 30_000 - TASKS[task].max_new_tokens
    assert task == "qa_1" or set(solve(text).split()) == set(question.references)
    assert sum(length > len(text) / 4 for length in tokenised) == 1
    # What was estimated wrongly is counted.
    for estimated in (20, 2 * len(question.ids)):
        monkeypatch.setattr(ruler_draft, "LONG", 2_000)
        monkeypatch.setattr(ruler_draft, "_estimated_units", lambda *_, units=estimated: units // 10)
        assert len(build(task, 4096, sources)[1].ids) == 4096 - TASKS[task].max_new_tokens


def test_frequencies_follow_zipf() -> None:
    assert zipf_counts(3, 49, 2.0) == [36, 9, 4]


def test_effective_length_and_weighted_averages() -> None:
    averages = {"4096": {"mean": 0.9}, "8192": {"mean": 0.856}, "16384": {"mean": 0.5}}
    assert effective_length(averages, 85.6) == 8192
    assert effective_length({"4096": {"mean": 0.8}}, 85.6) is None
    assert weighted_average(averages, increasing=True) == pytest.approx((90 + 2 * 85.6 + 3 * 50) / 6)
    assert weighted_average(averages, increasing=False) == pytest.approx((3 * 90 + 2 * 85.6 + 50) / 6)


def test_a_run_of_all_tasks(files: list[str], model: str, tmp_path: Path, generators: Generators) -> None:
    out = tmp_path / "out"
    arguments = ["--model", model, "--lengths", "4700", "6000", "--samples", "1", "--output", str(out), *files]
    generators.reply = lambda prompt: solve(prompt) if len(prompt) < 4700 else "nothing"
    assert ruler.main(arguments) == 0
    summary = summary_of(out)
    assert len(rows_of(out)) == 26
    assert {row["score"] for row in rows_of(out) if row["length"] == 4700} == {1.0}
    assert summary["models"]["tiny"]["average"]["4700"]["num_kinds"] == 13
    assert summary["models"]["tiny"]["average"]["6000"]["mean"] == 0.0
    assert summary["effective_length"] == {"tiny": 4700}
    assert (out / "scores.png").stat().st_size > 1000
    assert ruler.main(arguments) == 0
    assert len(generators) == 1
    assert ruler.main(["--plot-only", "--output", str(out), "--threshold", "101"]) == 0
    assert summary_of(out)["effective_length"] == {"tiny": None}


def test_nvidias_predictions_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three references found counts two thirds; a reading task counts whole; tasks weigh the same."""
    folder = tmp_path / "4096" / "pred"
    folder.mkdir(parents=True)
    row = {"input": "…", "others": {}, "truncated": -1, "length": 4001}
    write_jsonl(
        folder / "niah_multivalue.jsonl", [{"index": 0, "pred": " 11, 22", "outputs": ["11", "22", "33"], **row}]
    )
    answers = [{"index": i, "pred": "PARIS", "outputs": ["paris", "x"], **row} for i in range(3)]
    write_jsonl(folder / "qa_1.jsonl", answers)
    files = [str(folder / "niah_multivalue.jsonl"), str(folder / "qa_1.jsonl")]
    out = tmp_path / "out"
    assert ruler.main(["--score-only", *files, "--labels", "mine", "--output", str(out)]) == 0
    model = summary_of(out)["models"]["mine"]
    assert model["by_length"]["niah_multivalue"]["4096"]["mean"] == pytest.approx(2 / 3)
    assert model["average"]["4096"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert "effective length of mine: none (average of at least 85.6, 2 of 13 tasks)" in capsys.readouterr().out
    (folder / "qa_1.jsonl").rename(folder / "unknown.jsonl")
    assert ruler.main(["--score-only", str(folder / "unknown.jsonl")]) == 2
    assert "'unknown' is no task of RULER" in capsys.readouterr().err


def test_prompts_that_nvidia_prepared(model: str, tmp_path: Path, generators: Generators) -> None:
    folder = tmp_path / "ruler" / "8192" / "data" / "vt"
    folder.mkdir(parents=True)
    rows = [{"index": 7, "input": "Find it.", "answer_prefix": " It is", "outputs": ["AB", "CD"], "length": 40}]
    write_jsonl(folder / "validation.jsonl", rows)
    generators.reply = lambda prompt: "AB" if prompt == "Find it. It is" else ""
    out = tmp_path / "out"
    assert ruler.main(["--data", str(tmp_path / "ruler"), "--model", model, "--output", str(out)]) == 0
    [row] = rows_of(out)
    assert (row["item"], row["length"], row["score"]) == ("vt/8192/7", 8192, 0.5)
    assert generators[0].calls[0]["max_new_tokens"] == 30


def test_other_wording(tmp_path: Path, collections: dict[str, Collection]) -> None:
    file = tmp_path / "templates.json"
    file.write_text(json.dumps({"needle": "{key} hides the {kind} {value} here."}))
    templates = ruler.read_templates(file, TEMPLATES)
    text, question = build("niah_single_2", 4096, Sources(templates, 42, english(), collections))
    assert f"hides the numbers {question.references[0]} here." in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "niah_single_2, .*qa_2 need --haystack and --squad and --hotpotqa; .* --tasks niah_single_1"),
        (["--tasks", "qa_1"], "qa_1 need --squad"),
        (["--tasks", "qa_1", "--squad", "{tmp}/hotpot.json"], "not in SQuAD's form"),
        (["--tasks", "qa_2", "--hotpotqa", "{tmp}/squad.json"], "not in HotpotQA's form"),
        (
            ["--tasks", "vt", "--lengths", "200"],
            "--lengths has 200, 30 of them for the answer: too short for vt: .* room for 170. Raise --lengths",
        ),
        (
            ["--tasks", "niah_single_2", "--lengths", "300", "--haystack", "{tmp}/essay.txt"],
            "too short for niah_single_2",
        ),
        (["--tasks", "vt", "--lengths", "8200"], "tiny: 8200 tokens are beyond its max_position_embeddings 8192"),
        (["--tasks", "vt", "--samples", "0"], "--samples is 0"),
        (["--tasks", "vt", "--data", "{tmp}"], "holds no TASK/"),
        (["--tasks", "vt", "--templates", "{tmp}/bad.json"], "'vt_first' must hold {{name}}, {{value}}"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    flags: list[str],
    says: str,
    model: str,
    files: list[str],
    tmp_path: Path,
    generators: Generators,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(files[1]).parent
    (folder / "bad.json").write_text(json.dumps({"vt_first": "VAR {name}"}))
    asked = [flag.format(tmp=folder) for flag in flags]
    assert ruler.main(["--model", model, "--output", str(tmp_path / "out"), *asked]) == 2
    assert re.search(f"^error: .*{says.format()}", capsys.readouterr().err, re.MULTILINE)
    assert not generators
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ruler.main(["--tasks", "niah", "--output", "x"])
    assert "niah_multikey_3" in capsys.readouterr().err
