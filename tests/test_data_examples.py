"""Supervised fine-tuning: which tokens are learnt, what is cut, what is refused; and that the train loop honours it."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from easyctx.data.load import check_targets, load_tokenised
from easyctx.data.packed import collate
from easyctx.training.data import inputs_and_targets
from tests.data_helpers import byte_bpe, run, save_marked_tokenizer, summary_of

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Drops what an assistant thought in earlier turns, as reasoning models' templates do.
FORGETFUL = TEMPLATE.replace(
    "m['content'] | trim", "m['content'] if loop.last or m['role'] == 'user' else m['content'].split('THOUGHT')[-1]"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where sat the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "It sat longer."},
]


def save_chat_tokenizer(folder: Path, template: str = TEMPLATE) -> str:
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(special_tokens=special), eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_marked_tokenizer(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_chat_tokenizer(tmp_path_factory.mktemp("chat"))


def build(folder: Path, tokenizer: str, records: list[dict], *more: str, length: int = 128) -> int:
    source = folder / "examples.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run(source, tokenizer, folder / "out", "--sft", *more, length=length)


def decoded(folder: Path, tokenizer: str) -> list[tuple[str, str]]:
    """(whole text, learnt text) of every document of the rows, padding left out, in order of their texts."""
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    found = []
    for row in load_tokenised(folder / "out").with_format("torch"):
        for number in range(int(row["document_ids"].max()) + 1):
            inside = row["document_ids"] == number
            ids, labels = row["input_ids"][inside], row["labels"][inside]
            assert torch.equal(labels[labels != -100], ids[labels != -100])
            if (labels != -100).any():
                found.append((decode(ids), decode(labels[labels != -100])))
    return sorted(found)


def test_prompt_and_response(marked: str, tmp_path: Path) -> None:
    records = [{"prompt": f"Where is cat {n}?", "response": f" On mat {n}."} for n in range(9)]
    assert build(tmp_path, marked, records) == 0
    want = [(f"<s>Where is cat {n}? On mat {n}.</s>", f" On mat {n}.</s>") for n in range(9)]
    assert decoded(tmp_path, marked) == want


def test_messages_learn_every_assistant_turn(chat: str, tmp_path: Path) -> None:
    assert build(tmp_path, chat, [{"messages": CHAT}]) == 0
    [(text, learnt)] = decoded(tmp_path, chat)
    assert text == AutoTokenizer.from_pretrained(chat).apply_chat_template(CHAT, tokenize=False)
    assert learnt == "On the mat.<|end|>It sat longer.<|end|>"


def test_only_the_document_is_cut(marked: str, chat: str, tmp_path: Path) -> None:
    long = " ".join(f"sentence {number}," for number in range(200))
    record = {"document": long, "question": "Where sat the cat?", "answers": ["On the mat.", "A mat."]}
    for name, tokenizer, more in (("plain", marked, ()), ("chat", chat, ("--chat",))):
        folder = tmp_path / name
        folder.mkdir()
        assert build(folder, tokenizer, [record], *more, length=96) == 0
        [(text, learnt)] = decoded(folder, tokenizer)
        summary = summary_of(folder / "out")
        assert summary["read"]["truncated_examples"] == 1
        assert summary["counts"]["tokens"] == 96  # the whole row is used
        head, _, question = text.partition("\n\nQuestion: ")
        if name == "plain":
            assert question == "Where sat the cat?\nAnswer: On the mat.</s>"
            assert learnt == " On the mat.</s>"
        else:
            assert question == "Where sat the cat?<|end|>\n<|assistant|>On the mat.<|end|>\n"
            assert learnt == "On the mat.<|end|>"
        document = head.removeprefix("<s>").removeprefix("<|user|>")
        assert long.startswith(document)
        assert len(document) > 50


def test_rows_of_their_own_lengths(marked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyctx.data.rows.FLUSH_TOKENS", 50)
    monkeypatch.setattr("easyctx.data.build.READ_TOKENS", 7)  # rows come in pieces
    records = [{"prompt": "Where is cat?" * (n + 1), "response": f" On mat {n}."} for n in range(9)]
    assert build(tmp_path, marked, records, "--unpacked") == 0
    rows = load_tokenised(tmp_path / "out").with_format("torch")
    assert sorted(rows.column_names) == ["input_ids", "labels"]
    decode = AutoTokenizer.from_pretrained(marked).decode
    assert [decode(row["input_ids"]) for row in rows] == [f"<s>{r['prompt']}{r['response']}</s>" for r in records]
    learnt = [decode(row["labels"][row["labels"] != -100]) for row in rows]
    assert learnt == [f" On mat {n}.</s>" for n in range(9)]
    summary = summary_of(tmp_path / "out")
    assert (summary["counts"]["rows"], summary["counts"]["padding_tokens"]) == (9, 0)
    assert "# Rows of up to 128 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_source_and_target_have_limits_of_their_own(marked: str, tmp_path: Path) -> None:
    """As Anima-100K had them: 92,000 tokens of document and question, 1,024 of the answer."""
    long = " ".join(f"sentence {number}," for number in range(200))
    answer = "On the mat. " * 9
    records = [
        {"document": long, "question": "Where sat the cat?", "answer": answer},
        {"document": long, "question": "Where sat the cat?", "answer": "On the mat."},
        {"document": "short", "question": "Where?", "answer": "Here."},
    ]
    limits = ("--unpacked", "--max-source-tokens", "60", "--max-target-tokens", "8")
    assert build(tmp_path, marked, records, *limits, length=96) == 0
    rows = load_tokenised(tmp_path / "out").with_format("torch")
    decode = AutoTokenizer.from_pretrained(marked).decode
    targets = [int((row["labels"] != -100).sum()) for row in rows]
    sources = [len(row["input_ids"]) - target for row, target in zip(rows, targets, strict=True)]
    assert (targets[0], sources[:2]) == (8, [60, 60])
    assert max(targets) <= 8
    for row in rows:
        assert "\n\nQuestion: Where" in decode(row["input_ids"]), "the question is whole"
    cut = decode(rows[0]["labels"][rows[0]["labels"] != -100])
    assert (" " + answer).startswith(cut), "a cut answer has no end mark, which would teach to end in the midst of it"
    assert decode(rows[2]["input_ids"]).endswith("Answer: Here.</s>")
    read = summary_of(tmp_path / "out")["read"]
    assert (read["truncated_examples"], read["cut_responses"]) == (2, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-source-tokens", "128"), "--max-source-tokens is 128, outside 1 .. 127"),
        (("--max-target-tokens", "0"), "--max-target-tokens is 0, outside 1 .. 127"),
        (("--unpacked", "--pack"), "--pack joins examples into rows and --unpacked does not"),
        (("--unpacked", "--pad-last"), "packed ones are padded anyway"),
        (("--max-source-tokens", "4"), "prompt and marks have 5 tokens, --max-source-tokens is 4"),
    ],
)
def test_limits_that_cannot_be(
    flags: tuple[str, ...], message: str, marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tmp_path, marked, [{"prompt": "The cat sat on", "response": " mat"}], *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "response": "  "}, "the response is empty"),
        ({"prompt": "a", "response": 3}, "field 'response' is int, not a string"),
        ({"prompt": "a" * 300, "response": "b"}, "--seq-length is 32, and nothing of them may be cut"),
        ({"document": "the cat", "question": "a" * 300, "answer": "b"}, "question and answer alone have"),
        ({"document": "the cat", "question": "a", "answers": []}, "the response is empty"),
        ({"document": "the cat", "question": "a"}, "fields 'document', 'question', where --sft needs messages;"),
        ({"text": "just text"}, "fields 'text', where --sft needs messages;"),
        ({"messages": CHAT[:2]}, "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the response is empty"),
        ({"messages": [{"content": "a"}]}, "a message has no role"),
        ({"prompt": "a", "response": "\ud800"}, "a lone surrogate"),
    ],
)
def test_what_cannot_be_learnt_is_named(
    record: dict, message: str, chat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "The cat", "response": " sat"}
    assert build(tmp_path, chat, [good, record], length=32) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "examples.jsonl:2: " in error
    assert build(tmp_path, chat, [good, record], "--skip-bad", length=32) == 0
    assert decoded(tmp_path, chat) == [("The cat sat<|end|>", " sat<|end|>")]


def test_templates(marked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tmp_path, marked, [{"messages": CHAT}]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert build(tmp_path, marked, [{"prompt": "a", "response": "b"}], "--chat") == 2
    assert "--chat: tokenizer" in capsys.readouterr().err
    forgetful = save_chat_tokenizer(tmp_path / "forgetful", FORGETFUL)
    thinking = [*CHAT[:2], {"role": "assistant", "content": "mats? THOUGHT On the mat."}, *CHAT[3:]]
    assert build(tmp_path, forgetful, [{"messages": thinking}]) == 2
    assert "writes turn 3 otherwise once others follow it" in capsys.readouterr().err


def test_the_train_loop_honours_it(marked: str, tmp_path: Path) -> None:
    records = [{"prompt": f"Where is cat {n}?", "response": f" On mat {n}."} for n in range(9)]
    assert build(tmp_path, marked, records) == 0
    dataset = load_tokenised(tmp_path / "out")
    check_targets(dataset, "labels", 128)
    batch = collate(list(dataset.with_format("torch")), 128)
    ids, targets, documents = inputs_and_targets(batch, 128)
    assert documents is not None
    tokenizer = AutoTokenizer.from_pretrained(marked)
    learnt = [tokenizer.decode(row[row != -100]) for row in targets]
    assert "".join(learnt) == "".join(f" On mat {n}.</s>" for n in range(9))
    # A target is the id of the next token, of the same document.
    row, place = (targets != -100).nonzero(as_tuple=True)
    assert torch.equal(targets[row, place], ids[row, place + 1])


def test_loss_mask_is_another_way_to_say_labels() -> None:
    ids = torch.arange(12).reshape(2, 6) + 5
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1]])
    by_mask = inputs_and_targets({"input_ids": ids, "loss_mask": mask}, 5)
    by_labels = inputs_and_targets({"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}, 5)
    assert torch.equal(by_mask[0], by_labels[0])
    assert torch.equal(by_mask[1], by_labels[1])
    assert by_mask[1].tolist() == [[-100, 7, 8, -100, 10], [-100, -100, -100, -100, 16]]


@pytest.mark.parametrize("borders", [{}, {"document_ids": [0, 0, 1, 1, 1, 2, 2]}, {"cu_seqlens": [0, 2, 5]}])
@pytest.mark.parametrize("learnt", [{}, {"labels": 1}, {"loss_mask": 1}])
def test_rows_of_several_lengths_make_a_batch(borders: dict[str, list[int]], learnt: dict[str, int]) -> None:
    """Each row gives what it gives alone, however long its company is."""

    def row(length: int) -> dict[str, torch.Tensor]:
        made = {"input_ids": torch.arange(length) + 5, **{name: torch.arange(length) % 2 for name in learnt}}
        for name, values in borders.items():
            made[name] = torch.tensor([*values, length] if name == "cu_seqlens" else values[:length])
        return made

    rows = [row(6), row(7), row(6)]
    together = inputs_and_targets(collate(rows, 7), 6)
    alone = [inputs_and_targets(collate([each], 7), 6) for each in rows]
    assert torch.equal(together[0], torch.cat([ids for ids, _, _ in alone]))
    assert torch.equal(together[1], torch.cat([targets for _, targets, _ in alone]))
    assert together[1][0, -1] == -100
    assert bool(borders) == (together[2] is not None)
    if together[2] is not None:
        assert together[2].starts == tuple(each.starts[0] for _, _, each in alone if each is not None)


@pytest.mark.parametrize(("column", "nothing"), [("labels", -100), ("loss_mask", 0)])
def test_rows_without_a_target_are_refused(column: str, nothing: int) -> None:
    def rows(*values: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"input_ids": [[1] * len(v) for v in values], column: list(values)})

    good = [nothing, nothing, 1, nothing]
    check_targets(rows(good, good), column, 2)  # the third label is the second token's target
    with pytest.raises(ValueError, match=r"row 1 of the dataset has no target in its first 4 tokens"):
        check_targets(rows(good, [1, nothing, nothing, nothing]), column, 4)
    with pytest.raises(ValueError, match=r"row 2 .*no target in its first 2 tokens .*\(the row has 4 tokens\)"):
        check_targets(rows(good, good, [nothing, nothing, nothing, 1]), column, 2)
    with pytest.raises(ValueError, match=f"row 1 of the dataset has 3 {column}, but --seq-length is 4"):
        check_targets(rows(good, good[:3]), column, 4)
