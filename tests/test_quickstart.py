"""The quickstart's parts: text, tokenizer, samples, model, report, and the script's own refusals."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from train_scripts.quickstart import folders, long_rows, pretrain, report, samples
from train_scripts.quickstart.corpus import Text, load_topics, split_topics, to_ids, unigram_perplexity
from train_scripts.quickstart.tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_scripts" / "quickstart.sh"


@pytest.fixture(scope="module")
def texts() -> tuple[Text, Text]:
    return split_topics(load_topics())


def as_string(ids: np.ndarray) -> str:
    return bytes(ids.tolist()).decode()


def paragraphs(text: Text) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.string) if part.strip()]


def test_topics_are_enough_text_and_the_split_has_no_paragraph_in_common(texts: tuple[Text, Text]) -> None:
    training, held_out = texts
    assert len(training.ids) > 200_000
    assert len(held_out.ids) > 16 * long_rows.LONG_LENGTH
    both = paragraphs(training) + paragraphs(held_out)
    assert len(both) == len(set(both))
    assert 10 < unigram_perplexity(training, held_out) < 40


def test_split_takes_repeated_paragraphs_out_of_the_training_text() -> None:
    names = [f"topic{number}" for number in range(40)]
    training, held_out = split_topics({name: f"All have this.\n\nOnly {name} has\n  that." for name in names})
    assert "All have this." in held_out.string
    assert "All have this." not in training.string
    assert sorted(re.findall(r"topic\d+", training.string + held_out.string)) == sorted(names)


def test_text_that_is_not_ascii_is_refused_by_ids_and_replaced_by_the_split() -> None:
    with pytest.raises(ValueError, match="é"):
        to_ids("café")
    training, held_out = split_topics({"a": "café", "b": "thé"})
    assert "é" not in training.string + held_out.string


def test_tokens_are_bytes_and_the_saved_tokenizer_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, max_length=256)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Say [NUMBER=4821] , don't\n\n\tstop. \x00\x7fé€"
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 256
    assert tokenizer.model_max_length == 256


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("prompt_length", [100, 201, 256])
def test_needle_row_hides_one_number_and_asks_for_it(
    texts: tuple[Text, Text], num_queries: int, prompt_length: int
) -> None:
    rng = np.random.default_rng(prompt_length)
    for _ in range(20):
        row = samples.needle_row(texts[0], rng, 256, prompt_length, num_queries)
        string = as_string(row.ids)
        numbers = re.findall(r" \[NUMBER=(\d{4})", string)
        assert len(numbers) == num_queries + 1
        assert len(set(numbers)) == 1
        assert as_string(row.ids[row.is_answer]) == numbers[0] * num_queries
        assert string[:prompt_length].endswith(samples.STUB + numbers[0])
        assert row.is_answer[prompt_length - samples.DIGITS : prompt_length].all()
        assert row.is_answer[: string.index("]")].sum() == 0, "the needle itself cannot be foretold"
        item = samples.ITEM_LENGTH * (num_queries + 1)
        assert row.is_item.sum() == item - (prompt_length == 256), "the row's end cuts the closing bracket"
        assert as_string(row.ids[~row.is_item]) in texts[0].string, "the rest is running text"


def test_needles_stand_everywhere_the_first_and_the_last_place_included(texts: tuple[Text, Text]) -> None:
    rng = np.random.default_rng(0)
    rows = [samples.needle_row(texts[0], rng, 128, 128, 1) for _ in range(400)]
    begins = np.array([int(row.is_item.argmax()) for row in rows])
    last = 128 + 1 - 2 * samples.ITEM_LENGTH
    assert 0.04 < np.mean(begins == 0) < 0.2
    assert 0.06 < np.mean(begins == last) < 0.25
    assert np.histogram(begins, bins=4, range=(0, last))[0].min() > 40


@pytest.mark.parametrize(
    ("prompt_length", "num_queries"), [(2 * samples.ITEM_LENGTH - 2, 1), (129, 1), (100, 0)], ids=str
)
def test_a_row_without_room_is_refused(texts: tuple[Text, Text], prompt_length: int, num_queries: int) -> None:
    with pytest.raises(ValueError, match=f"{prompt_length} bytes in a row of 128"):
        samples.needle_row(texts[0], np.random.default_rng(0), 128, prompt_length, num_queries)


def test_short_rows_fill_their_length_and_depend_on_the_seed_alone(texts: tuple[Text, Text]) -> None:
    for stage in pretrain.STAGES:
        ids, is_answer = samples.short_rows(texts[0], np.random.default_rng(3), stage.length, 8, stage.several)
        again, _ = samples.short_rows(texts[0], np.random.default_rng(3), stage.length, 8, stage.several)
        assert ids.shape == is_answer.shape == (8, stage.length)
        assert np.array_equal(ids, again)
        assert is_answer[:, -samples.DIGITS :].all()


def test_long_rows_load_for_training_and_hold_answers_and_some_text(texts: tuple[Text, Text], tmp_path: Path) -> None:
    from easyctx.data.load import check_rows, load_tokenised

    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "old").touch()
    long_rows.save_long_rows(texts[0], 5, tmp_path / "rows", num_rows=24)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    assert not (tmp_path / "rows" / "old").exists()
    dataset = load_tokenised(tmp_path / "rows")
    check_rows(dataset, long_rows.LONG_LENGTH, 256)
    assert len(dataset) == 24
    far = 0
    for row in dataset:
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert len(ids) == len(labels) == long_rows.LONG_LENGTH
        has_loss = labels != samples.IGNORE
        assert np.array_equal(ids[has_loss], labels[has_loss])
        places = [match.start() for match in re.finditer(r" \[NUMBER=\d{4}", as_string(ids))]
        assert 2 <= len(places) <= 1 + samples.MOST_LONG_QUERIES
        num_answers = samples.DIGITS * (len(places) - 1)
        assert num_answers + 8 < has_loss.sum() <= num_answers + long_rows.NUM_TEXT_LABELS
        far = max(far, places[-1] - places[0])
    assert far > 1024


def test_the_course_of_training_rises_and_falls() -> None:
    shares = [pretrain.rate_share(step, 1000) for step in range(1000)]
    assert shares[0] < 0.1
    assert max(shares) == pytest.approx(1, rel=0.01)
    assert shares[-1] == pytest.approx(pretrain.LAST_SHARE, rel=0.01)
    weights = [pretrain.text_weight(step, 1000) for step in range(1000)]
    assert weights[0] == pretrain.FIRST_TEXT_WEIGHT
    assert weights[-1] == pytest.approx(pretrain.LAST_TEXT_WEIGHT, abs=0.01)


def test_every_parameter_has_one_optimizer_and_muon_only_the_layers_matrices() -> None:
    model = pretrain.make_model(seed=0)
    muon, adam = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in pretrain.make_optimizers(model)
    )
    assert not muon & adam
    assert muon | adam == {id(p) for p in model.parameters()}
    assert muon == {id(p) for p in model.model.layers.parameters() if p.ndim == 2}


def test_a_stage_ends_when_it_is_learned_but_not_at_once_or_after_its_most_steps() -> None:
    stage = pretrain.Stage(64, most_steps=300, several=0.5)
    assert not pretrain.is_over(stage, 299, answer_loss=0.5)
    assert pretrain.is_over(stage, 300, answer_loss=0.5)
    assert not pretrain.is_over(stage, pretrain.LEAST_STEPS - 1, answer_loss=0.01)
    assert pretrain.is_over(stage, pretrain.LEAST_STEPS, answer_loss=0.01)


def test_losses_part_answers_from_text() -> None:
    model = pretrain.make_model(seed=0)
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
    is_answer = torch.zeros(2, 24, dtype=torch.bool)
    is_answer[0, 20:] = is_answer[1, 5:7] = True
    answer, text = pretrain.losses(model, ids, is_answer)
    per_token = -model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(answer, (per_token[0, 19:].sum() + per_token[1, 4:6].sum()) / 6)
    torch.testing.assert_close(text, (per_token.sum() - per_token[0, 19:].sum() - per_token[1, 4:6].sum()) / 40)


def test_a_few_steps_of_training_learn_text(texts: tuple[Text, Text]) -> None:
    model = pretrain.train(texts[0], 1, num_steps=12, stages=(pretrain.Stage(32, 12, 0.5),)).cpu()
    ids, is_answer = (torch.from_numpy(x) for x in samples.short_rows(texts[1], np.random.default_rng(0), 32, 16, 0.5))
    untrained = pretrain.losses(pretrain.make_model(seed=1), ids, is_answer)[1]
    assert pretrain.losses(model, ids, is_answer)[1] < untrained - 1


def test_an_initialisation_that_learns_nothing_is_given_up(
    texts: tuple[Text, Text], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages, of which the first cannot be learned in its three steps: the last beginning goes on all the same.

    Training once more from there is the same, so that runs are repeatable.
    """
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = pretrain.LlamaConfig
    monkeypatch.setattr(pretrain, "LlamaConfig", lambda **settings: config(**settings | narrow))
    monkeypatch.setattr(pretrain, "TOKENS_PER_STEP", 256)
    stages = (pretrain.Stage(32, 3, 0.5), pretrain.Stage(32, 3, 0.5))
    model = pretrain.train(texts[0], 1, num_steps=5, stages=stages)
    assert capsys.readouterr().out.count("beginning again") == pretrain.MOST_BEGINNINGS - 1
    last = pretrain.train_once(texts[0], 1, pretrain.MOST_BEGINNINGS - 1, 5, stages)
    for one, other in zip(model.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    first, second = (pretrain.make_model(1, beginning).lm_head.weight for beginning in (0, 1))
    assert not torch.equal(first, second)


def write_results(output: Path) -> None:
    """What the evals leave, as far as the report reads it."""
    for folder, scores in ((folders.NEEDLE_BEFORE, (1.0, 0.25)), (folders.NEEDLE_AFTER, (0.975, 1.0))):
        by_length = {length: {"mean": score} for length, score in zip(("256", "1024"), scores, strict=True)}
        folders.write_text(output / folder / "summary.json", json.dumps({"by_length": by_length}))
    curves = {"before": {"256": 3.5, "1024": None}, "after": {"256": 3.75, "1024": 3.8}}
    summary = {"perplexity": curves, "versions": {"torch": "2.13.0"}}
    folders.write_text(output / folders.PERPLEXITY / "summary.json", json.dumps(summary))


def test_report_gathers_the_scores_and_prints_one_table(tmp_path: Path) -> None:
    write_results(tmp_path)
    summary = report.summarise(tmp_path, seconds=250.0)
    assert summary == {
        "needle_before": {"256": 1.0, "1024": 0.25},
        "needle_after": {"256": 0.975, "1024": 1.0},
        "perplexity_before": {"256": 3.5, "1024": None},
        "perplexity_after": {"256": 3.75, "1024": 3.8},
        "seconds": 250.0,
        "versions": {"torch": "2.13.0"},
    }
    lines = report.table(summary).splitlines()
    assert lines[0].split("  ")[-1] == "perplexity after"
    assert [line.split() for line in lines[1:]] == [
        ["256", "100%", "98%", "3.50", "3.75"],
        ["1024", "25%", "100%", "-", "3.80"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_script_gives_the_evals_the_templates_of_the_samples() -> None:
    script = SCRIPT.read_text()
    assert f'--needle "{samples.NEEDLE}"' in script
    assert f'--question "{samples.STUB}"' in script
    assert f"--digits {samples.DIGITS} " in script
    assert f"--seq-length {long_rows.LONG_LENGTH} " in script
    steps, batch_size = (int(re.findall(rf"--{name} (\d+)", script)[0]) for name in ("max-train-steps", "batch-size"))
    assert steps * batch_size == long_rows.NUM_ROWS, "every row is seen once"
    for name in (folders.SHORT_MODEL, folders.LONG_MODEL, folders.NEEDLE_BEFORE, folders.PERPLEXITY, folders.LONG_ROWS):
        assert re.search(rf"\brm -rf .*\b{name}\b", script), f"{name} is not cleared"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sede", "1"], "unknown argument '--sede'"),
        (["--seed", "one"], "--seed is 'one'"),
        (["--output", "{full}"], "holds something else"),
        (["--output", "{file}"], "holds something else"),
    ],
)
def test_the_script_refuses_before_it_does_anything(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    places = {"full": tmp_path / "full", "file": tmp_path / "full" / "file"}
    command = ["bash", str(SCRIPT), *(argument.format(**places) for argument in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert said in done.stderr
    assert (tmp_path / "full" / "file").read_text() == "mine"
