"""LongChat: prompts, resume, scoring of predictions alone, refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from easyctx.evals.tasks import longchat
from easyctx.evals.tasks.longchat import make_parser, prepare
from easyctx.evals.tasks.longchat_prompts import (
    TEMPLATES,
    Conversation,
    Settings,
    lines_group,
    topics_group,
    with_opening,
)
from easyctx.evals.tasks.questions import split_shared
from easyctx.evals.tasks.shell import PromptShell
from tests.eval_helpers import TOKENIZERS, encoder, save_tiny_model, tokenizer
from tests.pool import RankPool
from tests.task_helpers import (
    Generators,
    fake_generators,
    rows_of,
    run_longchat_on_ranks,
    summary_of,
    write_jsonl,
)

SETTINGS = Settings(samples=1, questions=3, seed=42, templates=TEMPLATES)
TALKS = [
    Conversation("Old Maps", "USER: I would like to discuss the topic of Old Maps.\nASSISTANT: Gladly."),
    Conversation("Wild Bees", "USER: Do they sting?\nASSISTANT: Some do."),
    Conversation("Tall Ships", "USER: hello, let's talk about the topic of tall ships\nASSISTANT: Aye."),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192))


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> Generators:
    return fake_generators(monkeypatch)


@pytest.fixture
def topics(tmp_path: Path) -> str:
    entries = [
        {"TOPIC_ID": number, "TOPIC": talk.topic, "CONVERSATION": talk.text} for number, talk in enumerate(TALKS)
    ]
    file = tmp_path / "topics.json"
    file.write_text(json.dumps([*entries, {**entries[0], "TOPIC_ID": 9}]))
    return str(file)


def read_line(prompt: str) -> str:
    """A model that finds every line."""
    key = re.findall(r"CONTENT of line ([\w-]+)", prompt)[0]
    return "It is " + re.findall(rf"line {key}: REGISTER_CONTENT is <(\d+)>", prompt)[0] + "."


def read_topic(prompt: str) -> str:
    number = int(re.findall(r"topic number (\d+)", prompt)[0])
    return re.findall(r"(?i)the topic of ([a-z]+ [a-z]+)", prompt)[number - 1].lower()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_lines_for_any_tokenizer(name: str) -> None:
    group = lines_group(40, 0, SETTINGS)
    questions = group.build(PromptShell(encoder(name)))
    assert [question.item for question in questions] == list(group.items)
    assert len({question.labels["random_idx"] for question in questions}) == 3
    for question in questions:
        text = tokenizer(name).decode(question.ids.tolist(), skip_special_tokens=True)
        assert len(re.findall(r"REGISTER_CONTENT is <\d+>", text)) == 40
        assert read_line(text) == f"It is {question.references[0]}."
        assert question.labels["correct_line"] in text
        assert 1 <= int(question.references[0]) <= 50_000
    context, rests = split_shared([question.ids for question in questions])
    assert len(context) > 0.9 * len(questions[0].ids)
    for question, rest in zip(questions, rests, strict=True):
        assert [*context, *rest] == question.ids.tolist()


def test_prompts_come_from_seed_size_and_sample_alone() -> None:
    shell = PromptShell(encoder("byte_bpe"))

    def ids(num_lines: int, sample: int, **changes: Any) -> bytes:
        settings = Settings(1, 1, changes.get("seed", 42), TEMPLATES)
        return lines_group(num_lines, sample, settings).build(shell)[0].ids.tobytes()

    assert ids(30, 0) == ids(30, 0)
    assert len({ids(30, 0), ids(30, 1), ids(31, 0), ids(30, 0, seed=7)}) == 4


def test_topics_are_announced_once_each() -> None:
    assert [with_opening(talk, TEMPLATES["opening"]) == talk.text for talk in TALKS] == [True, False, True]
    [first, *_] = topics_group(TALKS, 3, 0, SETTINGS).build(PromptShell(encoder("byte_bpe")))
    text = tokenizer("byte_bpe").decode(first.ids.tolist())
    assert len(re.findall(r"(?i)the topic of", text)) == 3
    assert read_topic(text) == first.references[0].lower()


def test_a_chat_template_wraps_the_prompt_and_brings_its_own_bos() -> None:
    chatty = TOKENIZERS["metaspace_bpe"]()
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}"
    )
    from easyctx.evals.encoding import TextEncoder

    shell = PromptShell(TextEncoder(chatty), chat=True)
    ids = shell.encode("a question", " The answer:").tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert chatty.decode(ids, skip_special_tokens=True).strip() == "[user]a question[/][bot] The answer:"
    with pytest.raises(ValueError, match="no chat template"):
        PromptShell(encoder("metaspace_bpe"), chat=True)


@pytest.mark.usefixtures("figures")
def test_a_run_leaves_rows_table_picture_and_summary(model: str, tmp_path: Path, generators: Generators) -> None:
    out = tmp_path / "out"
    arguments = ["--task", "lines", "--model", model, "--lines", "5", "10", "--samples", "3", "--output", str(out)]
    generators.reply = lambda prompt: read_line(prompt) if prompt.count("<") == 5 else "I do not know 1"
    assert longchat.main([*arguments, "--stop", "\\n"]) == 0
    rows = rows_of(out)
    assert len({row["item"] for row in rows}) == len(rows) == 6
    assert [row["score"] for row in rows if row["num_lines"] == 5] == [1.0] * 3
    assert generators[0].calls[0] == {
        "context": rows[0]["prompt_tokens"], "questions": 1, "max_new_tokens": 100, "stop": ["\n"]
    }  # fmt: skip
    scores = summary_of(out)["models"]["tiny"]
    assert scores["by_num_lines"]["lines"]["5"]["mean"] == 1.0
    assert scores["by_num_lines"]["lines"]["10"]["mean"] == 0.0
    assert scores["by_num_lines"]["lines"]["10"]["interval"][1] == pytest.approx(0.5615, abs=1e-3)
    assert (scores["mean"], scores["num_answers"]) == (0.5, 6)
    assert (out / "scores.png").stat().st_size > 1000
    assert len((out / "answers.csv").read_text().splitlines()) >= 7


def test_a_killed_run_goes_on_and_a_finished_one_loads_nothing(
    model: str,
    tmp_path: Path,
    generators: Generators,
    topics: str,
) -> None:
    out = tmp_path / "out"
    arguments = ["--task", "topics", "--data", topics, "--model", model, "--topics", "2", "3"]
    arguments += ["--samples", "2", "--questions", "2", "--output", str(out)]
    generators.reply = read_topic
    assert longchat.main(arguments) == 0
    file = out / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 8
    file.write_text("".join(lines[:4]) + lines[4][:50])
    assert longchat.main(arguments) == 0
    assert [call["questions"] for call in generators[1].calls] == [2, 2]
    assert {row["item"] for row in rows_of(out)} == {json.loads(line)["item"] for line in lines}
    assert summary_of(out)["models"]["tiny"]["mean"] == 1.0
    assert longchat.main(arguments) == 0
    assert longchat.main(["--plot-only", "--output", str(out)]) == 0
    assert len(generators) == 2
    assert longchat.main([*arguments, "--seed", "1"]) == 2


def test_several_models_share_a_figure(model: str, tmp_path: Path, generators: Generators) -> None:
    other = str(save_tiny_model(tmp_path / "other", seed=1, max_position_embeddings=8192))
    generators.reply = read_line
    arguments = ["--task", "lines", "--model", model, other, "--lines", "5", "--samples", "2"]
    assert longchat.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert set(summary_of(tmp_path / "out")["models"]) == {"tiny", "other"}
    assert len(generators) == 2


def test_a_models_own_answers_are_those_of_transformers(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--task", "lines", "--model", model, "--lines", "6", "--samples", "1", "--questions", "2"]
    assert longchat.main([*arguments, "--max-new-tokens", "7", "--offload-cache", "--output", str(out)]) == 0
    rows = {row["item"]: row for row in rows_of(out)}
    [group] = prepare(make_parser().parse_args(arguments)).groups
    stock = LlamaForCausalLM.from_pretrained(model)
    for question in group.build(PromptShell(encoder("bytes"))):
        ids = torch.from_numpy(question.ids)[None]
        want = stock.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
        assert rows[question.item]["prediction"] == tokenizer("bytes").decode(want, skip_special_tokens=True)
        assert rows[question.item]["prompt_tokens"] == ids.shape[1]


@pytest.mark.parametrize(("mode", "sp_degree"), [("data_parallel", 1), ("zigzag_ring_attn", 2)])
def test_two_ranks_answer_as_one_process(
    mode: str, sp_degree: int, model: str, tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    arguments = ["--task", "lines", "--model", model, "--lines", "5", "8", "--samples", "2", "--max-new-tokens", "5"]
    longchat.main([*arguments, "--output", str(tmp_path / "one")])
    ranks(2).run(run_longchat_on_ranks, mode, sp_degree, [*arguments, "--output", str(tmp_path / "two")])
    one, two = (
        sorted([{**row, "seconds": 0} for row in rows_of(tmp_path / name)], key=lambda row: row["item"])
        for name in ("one", "two")
    )
    assert len(one) == 4
    assert one == two


def test_ready_prompts_in_the_public_form(model: str, tmp_path: Path, generators: Generators) -> None:
    data = write_jsonl(
        tmp_path / "lines.jsonl",
        [{"random_idx": [0], "expected_number": 12, "num_lines": 1, "correct_line": "line a: <12>", "prompt": "P"}],
    )
    generators.reply = lambda prompt: f"{prompt} 12"
    out = tmp_path / "out"
    assert longchat.main(["--task", "lines", "--data", str(data), "--model", model, "--output", str(out)]) == 0
    assert [(row["prediction"], row["score"], row["num_lines"]) for row in rows_of(out)] == [("P 12", 1.0, 1)]


def test_predictions_are_scored_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_jsonl(
        tmp_path / "vicuna.jsonl",
        [
            {"expected_number": 12, "num_lines": 200, "prediction": "it is 12"},
            {"expected_number": 13, "num_lines": 200, "prediction": "it is 12"},
        ],
    )
    assert longchat.main(["--task", "lines", "--score-only", str(lines)]) == 0
    assert "longchat lines vicuna: 0.5000" in capsys.readouterr().out
    talks = write_jsonl(tmp_path / "t.jsonl", [{"topics": ["Old Maps", "Bees"], "prediction": "old maps"}])
    out = tmp_path / "out"
    arguments = ["--task", "topics", "--score-only", str(talks), "--labels", "mine", "--output", str(out)]
    assert longchat.main(arguments) == 0
    assert summary_of(out)["models"]["mine"]["by_num_topics"]["topics"]["2"]["mean"] == 1.0
    (out / "settings.json").write_text("{}")
    assert longchat.main(arguments) == 2
    assert "holds a run's results" in capsys.readouterr().err
    assert (out / "scores.png").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task", "topics"], "needs --data"),
        (["--task", "topics", "--data", "{topics}", "--topics", "9"], "has 9, but .* holds 3 different"),
        (["--task", "topics", "--data", "{topics}", "--topics", "2", "--position", "3"], "is 3, but .* has 2 topics"),
        (["--task", "topics", "--data", "{topics}", "--topics", "2", "--position", "0"], "position is 0, but"),
        (["--task", "topics", "--data", "{tmp}/none.json"], "none.json is no file"),
        (["--task", "topics", "--data", "{tmp}/lines.jsonl"], "line 1 has none of TOPIC"),
        (["--task", "lines", "--lines", "2", "--questions", "3"], "has 2, fewer than --questions 3"),
        (["--task", "lines", "--samples", "0"], "--samples is 0"),
        (["--task", "lines", "--templates", "{tmp}/lines.jsonl"], "not an object of texts|has 'x'"),
        (["--task", "lines", "--chat"], "no chat template"),
        (["--task", "lines", "--lines", "5", "900", "--samples", "1"], "beyond its max_position_embeddings 8192: give"),
        (["--task", "lines", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--task", "lines", "--score-only", "{tmp}/lines.jsonl"], "has none of expected_number|none of prediction"),
        ([], "--task lines or --task topics"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    flags: list[str],
    says: str,
    model: str,
    topics: str,
    tmp_path: Path,
    generators: Generators,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_jsonl(tmp_path / "lines.jsonl", [{"x": "y"}])
    asked = [flag.format(tmp=tmp_path, topics=topics) for flag in flags]
    assert longchat.main(["--model", model, "--output", str(tmp_path / "out"), *asked]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: .*({says})", error, re.MULTILINE)
    assert not generators
    assert not (tmp_path / "out").exists()
