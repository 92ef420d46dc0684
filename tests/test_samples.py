"""Answers given during training: what they are, and that training does not notice them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyctx import train
from easyctx.data.prompts import read_prompts
from easyctx.generation import Generator
from easyctx.generation.context import PREFILL_CHUNK
from easyctx.training.samples import SAMPLES, longest_chunk, set_aside
from tests.data_helpers import save_marked_tokenizer
from tests.models import tiny_model
from tests.sample_jobs import PROMPTS, STEPS, Run, sampled_steps
from tests.test_data_examples import CHAT, save_chat_tokenizer
from tests.train_helpers import LENGTH, flags, make_inputs

LORA = dict(lora_r=4, lora_dropout=0.2, loss="tiled", gradient_accumulate_every=1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("samples"), vocab_size=512)
    (folder / "prompts.txt").write_text("The cat sat\n\nand then\n")
    return folder


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / SAMPLES).read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora with dropout"])
def test_a_run_with_samples_is_the_run_without(inputs, tmp_path, changes, capsys):
    every = dict(sample_every=1, sample_prompts=inputs / "prompts.txt", sample_tokens=5, recompute="all")
    assert train.main(flags(inputs, tmp_path / "with", **changes, **every)) == 0
    said = capsys.readouterr().out
    assert train.main(flags(inputs, tmp_path / "without", **changes, recompute="all")) == 0
    cards = [json.loads((tmp_path / name / "easyctx_run.json").read_text()) for name in ("with", "without")]
    for step in ("first_step", "last_step"):
        assert cards[0][step]["loss"] == cards[1][step]["loss"]
        assert cards[0][step]["grad_norm"] == cards[1][step]["grad_norm"]
    (file,) = (tmp_path / "with").glob("*.safetensors")
    got, want = load_file(file), load_file(tmp_path / "without" / file.name)
    assert all(torch.equal(got[name], want[name]) for name in want)
    rows = rows_of(tmp_path / "with")
    assert [(row["step"], row["prompt"]) for row in rows] == [(step, n) for step in (1, 2, 3) for n in (0, 1)]
    assert f"prompt 1 after step 3: {rows[-1]['text']!r}" in said


def test_answers_are_the_models_own_and_a_resumed_run_keeps_none_of_later_steps(inputs, tmp_path):
    sampling = dict(sample_every=2, sample_prompts=inputs / "prompts.txt", sample_tokens=5, max_train_steps=4)
    output = tmp_path / "out"
    assert train.main(flags(inputs, output, save_every=2, **sampling)) == 0
    rows = rows_of(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    generator = Generator(AutoModelForCausalLM.from_pretrained(output).eval(), tokenizer)
    for row, text in zip(rows[-2:], ("The cat sat", "and then"), strict=True):
        (answer,) = generator.answer(tokenizer(text)["input_ids"], max_new_tokens=5)
        assert (row["step"], row["text"], row["stopped_by"]) == (4, answer.text, answer.stopped_by)
    (output / "easyctx_run.json").unlink()  # as if it had been killed, in the midst of a row
    with (output / SAMPLES).open("a") as file:
        file.write('{"step": 4, "pro')
    assert train.main(flags(inputs, output, save_every=2, resume=True, **sampling)) == 0
    assert rows_of(output) == rows


@pytest.mark.parametrize(
    ("mode", "sp_degree", "more"),
    [
        ("zigzag_ring_attn", 2, {}),
        ("zigzag_ring_attn", 2, {"sharded": True}),
        ("ulysses_attn", 2, {"memory": "all"}),
        ("data_parallel", 1, {}),
    ],
    ids=["ddp", "fsdp2", "spill", "data_parallel"],
)
def test_ranks_answer_together(ranks, tmp_path, inputs, mode, sp_degree, more):
    save_marked_tokenizer(tmp_path / "model")
    world = 2 * sp_degree
    got = ranks(world).run(sampled_steps, Run(mode, sp_degree, tmp_path, 1, **more))
    want = ranks(world).run(sampled_steps, Run(mode, sp_degree, tmp_path, 0, **more))
    for rank, (found, wanted) in enumerate(zip(got, want, strict=True)):
        assert found["losses"] == wanted["losses"], rank
        assert torch.equal(found["draw"], wanted["draw"])
        assert found["train"]
        for name, weight in wanted["weights"].items():
            assert torch.equal(found["weights"][name], weight), (rank, name)
        assert found["answers"] == got[0]["answers"]
    model = tiny_model("llama", torch.float32)
    model.load_state_dict(got[0]["weights"], strict=False)
    generator = Generator(model.eval(), AutoTokenizer.from_pretrained(tmp_path / "model"))
    alone = [generator.answer(prompt, max_new_tokens=6)[0].text for prompt in PROMPTS]
    assert got[0]["answers"][-1] == alone
    assert len(rows_of(tmp_path)) == STEPS * len(PROMPTS)


def test_a_chunk_is_at_most_one_tile_of_an_mlp():
    model = tiny_model("llama", torch.float32)
    assert longest_chunk(model) == PREFILL_CHUNK
    for tile, chunk in ((0, PREFILL_CHUNK), (64, 64), (2 * PREFILL_CHUNK, PREFILL_CHUNK)):
        choices = SimpleNamespace(mlp_tile=tile)
        model.easyctx_memory = SimpleNamespace(decision=SimpleNamespace(choices=choices))
        assert longest_chunk(model) == chunk


def test_modules_go_back_to_the_modes_that_each_had():
    model = tiny_model("llama", torch.float32).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    draw = torch.get_rng_state()
    during = []

    def answer() -> None:
        with set_aside(model):
            during.extend(module.training for module in model.modules())
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        answer()
    assert not any(during)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), draw)


def test_prompts_are_those_of_training(tmp_path):
    marked = AutoTokenizer.from_pretrained(save_marked_tokenizer(tmp_path / "marked"))
    chat = AutoTokenizer.from_pretrained(save_chat_tokenizer(tmp_path / "chat"))
    document = " ".join(f"sentence {number}," for number in range(99))
    records = [{"prompt": "The cat"}, {"document": document, "question": "Where?"}, {"document": "a", "question": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    first, long, short = read_prompts(str(tmp_path / "a.jsonl"), marked, "N", 60)
    assert marked.decode(first) == "<s>The cat"
    assert len(long) == 60
    assert marked.decode(long).startswith("<s>sentence 0,")
    assert marked.decode(long).endswith("\n\nQuestion: Where?\nAnswer:")
    assert marked.decode(short) == "<s>a\n\nQuestion: b\nAnswer:"
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (asked,) = read_prompts(str(tmp_path / "b.jsonl"), chat, "N", 99)
    assert chat.decode(asked).endswith("<|user|>And then?<|end|>\n<|assistant|>")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("cat", dict(sample_every=0), "--sample-every is 0 and --sample-prompts"),
        ("cat", dict(sample_prompts=None), "and --sample-prompts None: give both or none"),
        ("cat", dict(sample_tokens=LENGTH), f"leave no room for a prompt in --seq-length {LENGTH}"),
        ("cat", dict(sample_tokens=0), "--sample-tokens is 0, and must be at least 1"),
        ("cat", dict(sample_prompts="/nowhere.txt"), "/nowhere.txt is no file"),
        ("\n \n", {}, "holds no prompt: write one a line"),
        ("cat " * LENGTH, {}, "txt:1: prompt and marks have "),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(
    inputs, tmp_path, capsys, monkeypatch, text, changes, message
):
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "p.txt").write_text(text)
    given = dict(sample_every=1, sample_prompts=tmp_path / "p.txt") | changes
    assert train.main(flags(inputs, tmp_path / "out", **given)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
