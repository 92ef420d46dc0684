"""The proof's parts: tokens put together from pieces, tasks that can be recalled, recipes, the runner, what travels."""

import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from easyctx.data.load import load_tokenised
from easyctx.evals.needle_settings import ANSWER_STUB, NEEDLE, QUESTION
from easyctx.evals.tasks.longchat_prompts import LINES
from easyctx.recipe.read import read_recipe
from easyctx.training.card import RUN_CARD
from train_scripts.proof import __main__ as proof
from train_scripts.proof import graph, pack, recipes, runner, start, texts
from train_scripts.proof import rows as proof_rows
from train_scripts.proof.rows import Rows, _joined
from train_scripts.proof.tasks import Tasks

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the old house stood by the river and nobody had lived in it for many a year. He said so, and went on.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(WORDS * 50)
    return start.train_tokenizer(folder, 1200)


@pytest.fixture(scope="module")
def tasks(tokenizer: Any) -> Tasks:
    return Tasks(tokenizer)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> np.ndarray:
    return np.array(tokenizer(WORDS * 200)["input_ids"], dtype=np.int32)


def test_pieces_have_the_tokens_of_the_whole_text(tokenizer: Any, tasks: Tasks) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        pair = tasks.pair(rng, set())
        for piece in (pair.told, pair.asked):
            assert tokenizer(tokenizer.decode(piece.ids))["input_ids"] == piece.ids.tolist()


def test_the_evals_own_wording_is_among_the_tasks(tokenizer: Any, tasks: Tasks) -> None:
    rng = np.random.default_rng(0)
    drawn = [tasks.pair(rng, set()) for _ in range(200)]
    asked = [pair for pair in drawn if tokenizer.decode(pair.asked.ids).startswith(QUESTION[:30])]
    assert asked
    for pair in asked:
        told, number = tokenizer.decode(pair.told.ids).strip(), tokenizer.decode(pair.asked.ids[pair.asked.learnt])
        city = told.split()[3]
        assert told == NEEDLE.format(city=city, number=number)
        assert tokenizer.decode(pair.asked.ids) == (QUESTION + ANSWER_STUB).format(city=city) + number + "\n"


def test_a_line_and_its_question_are_longchats(tokenizer: Any, tasks: Tasks) -> None:
    line, question = tasks.line("calm-river", "40312", learnt=False), tasks.line_question("calm-river", "40312")
    assert tokenizer.decode(line.ids) == LINES["line"].format(key="calm-river", number="40312")
    asked = LINES["lines_question"].format(key="calm-river")
    assert tokenizer(asked)["input_ids"] == question.ids[:-6].tolist()
    assert question.ids[-1] == tokenizer.eos_token_id
    assert question.learnt.tolist() == [False] * (len(question) - 6) + [True] * 6


@pytest.mark.parametrize("length", [64, 128, 256, 1024, 4096])
def test_rows_have_the_length_and_their_answers_can_be_recalled(
    tokenizer: Any, tasks: Tasks, text: np.ndarray, length: int
) -> None:
    rows = Rows(np.tile(text, 3), tasks, length)
    for number in range(20):
        row = rows.draw(np.random.default_rng([length, number]))
        assert len(row) == length
        assert row.learnt[1:].any()
        for begin, end in _stretches(row.learnt & np.isin(row.ids, tasks.digits)):
            answer, before = tokenizer.decode(row.ids[begin:end]), tokenizer.decode(row.ids[:begin])
            if end < length:
                assert answer in before


def _stretches(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def test_every_row_has_something_to_learn_after_its_first_token(tasks: Tasks, text: np.ndarray) -> None:
    rows = Rows(text, tasks, 256)
    assert all(rows.draw(np.random.default_rng(number)).learnt[1:].any() for number in range(3000))


def test_short_rows_teach_recall_rather_than_text(tokenizer: Any, tasks: Tasks, text: np.ndarray) -> None:
    def share(length: int) -> float:
        """Of digits in what is learnt of texts with tasks."""
        rows = Rows(np.tile(text, 5), tasks, length)
        drawn = _joined([rows.novel(np.random.default_rng(number)) for number in range(60)])
        return float(np.isin(drawn.ids[drawn.learnt], tasks.digits).mean())

    assert share(64) > 0.4 > share(1024) > share(8192)


def test_a_number_is_asked_for_again(tasks: Tasks, text: np.ndarray) -> None:
    rows = Rows(text, tasks, 256)
    asked = [again for number in range(20) for _, again in rows._asked(np.random.default_rng(number), 256)]
    assert 1.2 < np.mean([len(again) for again in asked]) < 2


def test_rows_without_room_for_a_task_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["--text", str(tmp_path), "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["rows", *folders, "--length", "32", "--rows", "4"])
    with pytest.raises(SystemExit):
        proof_rows.main()
    assert "--length is 32, and the longest task takes 64 tokens" in capsys.readouterr().err


def test_rows_are_written_by_processes_that_end_by_themselves(
    tmp_path: Path, tokenizer: Any, tasks: Tasks, text: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed leaves the semaphore of its tqdm behind, and Python complains of it at the end."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    Dataset.from_dict({"input_ids": [text.tolist()]}).save_to_disk(tmp_path / "text")
    processes: list[Any] = []

    def started(count: int) -> Any:
        pool = get_context("spawn").Pool(count)
        processes.extend(pool._pool)
        return pool

    monkeypatch.setattr(proof_rows, "get_context", lambda _: SimpleNamespace(Pool=started))
    folders = ["--text", "text", "--tokenizer", "tokenizer", "--output", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rows", *folders, "--length", "128", "--rows", "5", "--processes", "1"])
    proof_rows.main()
    rows = load_tokenised("out")
    wanted = [Rows(text, tasks, 128).draw(np.random.default_rng([0, number])) for number in range(5)]
    assert rows["input_ids"] == [row.ids.tolist() for row in wanted]
    assert rows["labels"] == [np.where(row.learnt, row.ids, -100).tolist() for row in wanted]
    assert [process.exitcode for process in processes] == [0]


def test_rows_follow_from_seed_and_number(tasks: Tasks, text: np.ndarray) -> None:
    rows = Rows(text, tasks, 512)
    one, again, other = (rows.draw(np.random.default_rng([0, number])) for number in (1, 1, 2))
    assert np.array_equal(one.ids, again.ids)
    assert not np.array_equal(one.ids, other.ids)


def test_line_breaks_of_the_edition_go_and_paragraphs_stay(tmp_path: Path) -> None:
    assert texts.unwrapped("One\ntwo  three.\n\n\n Four\n") == "One two three.\n\nFour\n"
    with pytest.raises(ValueError, match="no .txt"):
        texts.convert(tmp_path, tmp_path / "out")


def test_the_recipe_is_one_and_grows_64_times() -> None:
    recipe = read_recipe(str(ROOT / "train_scripts" / "proof" / "proof.yaml"))
    content = recipes.load(ROOT / "train_scripts" / "proof" / "proof.yaml")
    short, longer = recipes.split(content)
    assert [stage.name for stage in recipe.stages] == [stage["name"] for stage in [*short, *longer]]
    assert len(longer) >= 3
    assert longer[-1]["seq_length"] == 64 * short[-1]["seq_length"]


def test_two_processes_share_rows_and_then_sequences() -> None:
    content = recipes.main_recipe(recipes.load(ROOT / "train_scripts" / "proof" / "proof.yaml"), 2)
    short, longer = recipes.split(content)
    one = recipes.split(recipes.load(ROOT / "train_scripts" / "proof" / "proof.yaml"))[0]
    assert [2 * stage["batch_size"] for stage in short] == [stage["batch_size"] for stage in one]
    assert {stage["parallel_mode"] for stage in short} == {"data_parallel"}
    assert {stage["parallel_mode"] for stage in longer} == {"zigzag_ring_attn"}
    with pytest.raises(ValueError, match="no divisor"):
        recipes.main_recipe(content, 7)


def test_pose_costs_a_quarter_of_the_extension(tmp_path: Path, tokenizer: Any) -> None:
    content = recipes.load(ROOT / "train_scripts" / "proof" / "proof.yaml")
    content["model"] = str(tmp_path)
    sizes = proof.make_parser().parse_args(["--books", "x", "--held-out", "y"])
    sizes.length, sizes.seed = 2048, 0
    start.make_config(sizes, tokenizer).save_pretrained(tmp_path)
    made = recipes.controls(content, steps=5, length=4096)
    (pose,), (yarn,) = made["pose"]["stages"], made["yarn"]["stages"]
    whole = sum(recipes.stage_flops(content, stage) for stage in recipes.split(content)[1])
    assert recipes.stage_flops(content, pose) / whole == pytest.approx(0.25, abs=0.01)
    assert yarn["rope_factor"] == 64
    assert "rope_theta" not in yarn
    for name, control in made.items():
        recipes.write(control, tmp_path / f"{name}.yaml")
        assert len(read_recipe(str(tmp_path / f"{name}.yaml")).stages) == 1


def _task(name: str, folder: Path, needs: tuple[Path, ...], code: str) -> runner.Task:
    return runner.Task(name, folder / name, needs, lambda: [sys.executable, "-c", code, str(folder / name)])


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"


def test_tasks_run_after_what_they_need_and_only_once(tmp_path: Path) -> None:
    tasks = [_task("b", tmp_path, (tmp_path / "a",), WRITE), _task("a", tmp_path, (), WRITE)]
    assert runner.run_tasks(tasks, tmp_path, 2, 60) == ([], [])
    assert [row["task"] for row in runner.read_times(tmp_path)] == ["a", "b"]
    assert runner.run_tasks(tasks, tmp_path, 2, 60) == ([], [])
    assert len(runner.read_times(tmp_path)) == 2


def test_what_fails_holds_up_only_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [
        _task("bad", tmp_path, (), "raise SystemExit('no luck')"),
        _task("after", tmp_path, (tmp_path / "bad",), WRITE),
        _task("other", tmp_path, (), WRITE),
    ]
    assert runner.run_tasks(tasks, tmp_path, 1, 60) == (["bad"], ["bad", "after"])
    assert "no luck" in capsys.readouterr().out


def test_the_time_limit_stops_what_runs(tmp_path: Path) -> None:
    failed, left = runner.run_tasks([_task("slow", tmp_path, (), "import time; time.sleep(60)")], tmp_path, 1, 0.5)
    assert (failed, left) == ([], ["slow"])


def test_weights_of_the_short_and_the_newest_model_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = recipes.load(ROOT / "train_scripts" / "proof" / "proof.yaml")
    out = Path(content["output"])
    for name in ("256", "2k", "8k", "32k"):
        for file in ("config.json", "model.safetensors", "easyctx_run.json")[: 2 if name == "32k" else 3]:
            (out / name).mkdir(parents=True, exist_ok=True)
            (out / name / file).write_text("{}")
    (out / "rows").mkdir()
    (out / "rows" / "data.arrow").write_text("x")
    carried = [str(path.relative_to(out)) for path in pack.files_to_carry(content)]
    assert [path for path in carried if path.endswith(".safetensors")] == [
        "2k/model.safetensors",
        "8k/model.safetensors",
    ]
    assert not any(path.startswith(("rows", "32k")) for path in carried)
    assert len(pack.pack(content, tmp_path / "parts")) == 1


def test_rows_are_made_for_what_is_still_to_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROOT / "train_scripts" / "proof" / "proof.yaml"
    monkeypatch.chdir(tmp_path)
    args = proof.make_parser().parse_args([str(recipe), "--books", ".", "--held-out", "."])
    content = proof.prepare(args)
    out = Path(content["output"])

    def rows_of(*finished: str) -> list[str]:
        for name in finished:
            (out / name).mkdir(parents=True)
            (out / name / RUN_CARD).write_text("{}")
        tasks = graph.proof_tasks(args, content)
        rows = [task for task in tasks if task.name.startswith("rows_")]
        (main,) = [task for task in tasks if task.name == graph.MAIN]
        assert {task.makes for task in rows} >= set(main.needs[1:])
        return [task.name.removeprefix("rows_") for task in rows]

    assert rows_of() == ["64", "128", "256", "2k", "8k", "32k", "128k"]
    assert rows_of("64", "128", "256", "2k", "8k") == ["8k", "32k", "128k"]  # 8k: PoSE
    assert rows_of("32k", "128k") == ["8k", "128k"]
    assert rows_of("controls/pose/pose", "controls/yarn/yarn") == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--books", "nowhere", "--held-out", "."], "nowhere is no folder"),
        (["none.yaml", "--books", ".", "--held-out", "."], "none.yaml is no file"),
        (["--books", ".", "--held-out", ".", "--processes", "3"], "no divisor"),
        (["--books", ".", "--held-out", ".", "--only", "nedle_2k"], "--only nedle_2k is no task"),
        (["--books", ".", "--held-out", ".", "--processes", "64"], "--processes is 64, one a GPU, and there are"),
        (["--books", ".", "--held-out", ".", "--without", "pos"], "--without pos is no task"),
    ],
)
def test_bad_input_is_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        proof.main(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
