"""The proof on several GPUs: which command runs where, and what over several; the 32M recipe, and what travels."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from easyctx.environment import hardware
from easyctx.recipe.read import read_recipe
from easyctx.training.card import RUN_CARD
from train_scripts.proof import __main__ as proof
from train_scripts.proof import graph, pack, recipes, runner, start
from train_scripts.proof.rows import Rows
from train_scripts.proof.runner import Task, place
from train_scripts.proof.tasks import Tasks

FOLDER = Path(__file__).resolve().parents[1] / "train_scripts" / "proof"
LARGER = FOLDER / "proof_32m.yaml"
SIZES = ["--hidden", "640", "--layers", "6"]
WORDS = "the old house stood by the river and nobody had lived in it for many a year. He said so, and went on.\n"
SEES = "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"


def task(gpus: int, folder: Path = Path(), name: str = "x", code: str = SEES) -> Task:
    return Task(name, folder / name, (), lambda: [sys.executable, "-c", code, str(folder / name)], gpus)


@pytest.mark.parametrize(
    ("wanted", "taken", "placed"),
    [
        (1, [], (0,)),
        (1, [(0,)], (1,)),
        (1, [(0,), (1,), (0,)], (1,)),
        (2, [(0,)], (0, 1)),
        (1, [(0, 1)], (0,)),
        (1, [(0, 1), (0,)], (1,)),
        (1, [(0, 1), (0,), (1,)], None),  # a third command on a GPU would hold up the training on both
        (2, [(0, 1)], None),
        (0, [(0, 1), (0,), (1,)], ()),
    ],
)
def test_a_task_gets_the_least_busy_gpus_or_waits(
    wanted: int, taken: list[tuple[int, ...]], placed: tuple[int, ...] | None
) -> None:
    assert place(task(wanted), taken, 2) == placed


def test_one_gpu_is_shared_as_before() -> None:
    assert place(task(1), [(), (), ()], 1) == ()


@pytest.mark.parametrize(("visible", "names"), [(None, ["0", "1", "0,1"]), ("5,3", ["5", "3", "5,3"])])
def test_tasks_see_their_own_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.delenv(runner.VISIBLE, raising=False)
    if visible:
        monkeypatch.setenv(runner.VISIBLE, visible)
    wait = "import time; time.sleep(0.5); " + SEES
    tasks = [task(1, tmp_path, "a", wait), task(1, tmp_path, "b", wait), task(2, tmp_path, "c"), task(0, tmp_path, "d")]
    assert runner.run_tasks(tasks, tmp_path, 4, 60, gpus=2) == ([], [])
    assert [(tmp_path / name).read_text() for name in "abc"] == names
    assert (tmp_path / "d").read_text() == (visible or "all")
    machines = {row["task"]: row["hardware"] for row in runner.read_times(tmp_path)}
    assert machines["a"] == hardware(1)


def test_two_evals_beside_a_training_are_on_two_gpus_and_a_third_waits(tmp_path: Path) -> None:
    note = (
        "import os, sys, time, pathlib; t = time.time(); time.sleep(float(sys.argv[2])); "
        "pathlib.Path(sys.argv[1]).write_text(f'{t} {time.time()} ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    )

    def noting(name: str, gpus: int, seconds: float) -> Task:
        file = tmp_path / name
        return Task(name, file, (), lambda: [sys.executable, "-c", note, str(file), str(seconds)], gpus)

    tasks = [noting("training", 2, 2.5), *(noting(name, 1, 1.0) for name in ("one", "two", "three"))]
    assert runner.run_tasks(tasks, tmp_path, 8, 60, gpus=2) == ([], [])
    spans = {name: (tmp_path / name).read_text().split() for name in ("one", "two", "three")}
    assert {spans["one"][2], spans["two"][2]} == {"0", "1"}
    assert float(spans["three"][0]) > min(float(spans[name][1]) for name in ("one", "two"))


def of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[Any, dict[str, Task]]:
    """The recipe for two processes, and all tasks by name."""
    monkeypatch.chdir(tmp_path)
    words = [str(LARGER), "--books", ".", "--held-out", ".", "--processes", "2", "--parity", *SIZES, *flags]
    args = proof.make_parser().parse_args(words)
    content = proof.prepare(args)
    return content, {each.name: each for each in graph.proof_tasks(args, content)}


def test_training_takes_both_gpus_and_evals_and_controls_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, tasks = of_two(tmp_path, monkeypatch)
    wanted = {name: each.gpus for name, each in tasks.items()}
    assert {name for name, gpus in wanted.items() if gpus == 2} == {"main", "sp2"}
    assert {name for name, gpus in wanted.items() if not gpus} == {
        *("texts_train", "texts_held_out", "start", "text", "controls", "rows_parity"),
        *(f"rows_{stage['name']}" for stage in content["stages"]),
    }
    assert tasks["needle_128k"].command()[1] == "eval/needle.py"  # in one process


def test_the_larger_recipe_shares_rows_and_then_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = of_two(tmp_path, monkeypatch)
    recipes.write(content, tmp_path / "main.yaml")
    alone = {stage["name"]: stage for stage in recipes.whole_stages(recipes.load(LARGER))}
    for stage in read_recipe(str(tmp_path / "main.yaml")).stages:
        short = stage.config.seq_length <= 2048
        assert stage.processes == 2
        assert stage.config.parallel_mode == ("data_parallel" if short else "zigzag_ring_attn")
        assert stage.config.batch_size * (2 if short else 1) == alone[stage.name]["batch_size"]


def test_controls_of_two_processes_run_in_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = of_two(tmp_path, monkeypatch)
    monkeypatch.setattr(recipes, "stage_flops", lambda _, stage: float(stage["max_train_steps"]))
    made = {name: control["stages"][0] for name, control in recipes.controls(content, steps=5, length=4096).items()}
    modes = {name: (stage["processes"], stage["parallel_mode"]) for name, stage in made.items()}
    one, two = (1, "data_parallel"), (2, "zigzag_ring_attn")
    assert modes == {"yarn": one, "pose": one, "sp1": one, "sp2": two}


def test_the_larger_recipe_says_how_many_parameters_it_has(tmp_path: Path) -> None:
    args = proof.make_parser().parse_args(["--books", "x", "--held-out", "y", *SIZES])
    args.length = 2048
    config = start.make_config(args, tokenizer_of(tmp_path))
    config.vocab_size = args.vocabulary
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert f"({sum(p.numel() for p in model.parameters()):,}," in recipes.load(LARGER)["about"]


def tokenizer_of(folder: Path) -> Any:
    (folder / "a.txt").write_text(WORDS * 50)
    return start.train_tokenizer(folder, 1200)


def test_a_given_tokenizer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer_of(tmp_path).save_pretrained(tmp_path / "given")
    words = ["--tokenizer", str(tmp_path / "given"), "--output", str(tmp_path / "made"), "--hidden", "64"]
    monkeypatch.setattr(sys, "argv", ["start", *words, "--layers", "1"])
    start.main()
    given, made = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("given", "made"))
    assert given == made
    assert LlamaForCausalLM.from_pretrained(tmp_path / "made").config.vocab_size == 1200


def test_more_text_is_learnt_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(tmp_path)
    text = np.tile(np.array(tokenizer(WORDS * 200)["input_ids"], dtype=np.int32), 20)

    def learnt(*ratio: float) -> int:
        rows = Rows(text, Tasks(tokenizer), 65536, *ratio)
        return sum(int(rows.novel(np.random.default_rng(number)).learnt.sum()) for number in range(3))

    assert learnt(8) / learnt() == pytest.approx(9 / 5, rel=0.05)  # answers and text: 1 + 8 to 1 + 4
    _, tasks = of_two(tmp_path, monkeypatch, "--text-to-answers", "8")
    given = [name for name, each in tasks.items() if "--text-to-answers" in each.command()]
    assert given == ["rows_128k"]


def test_the_weights_that_travel_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = recipes.load(LARGER)
    out = Path(content["output"])
    for name in ("2k", "8k", "32k"):
        (out / name).mkdir(parents=True)
        for file in ("config.json", RUN_CARD):
            (out / name / file).write_text("{}")
        (out / name / "model.safetensors").write_bytes(os.urandom(pack.PART_BYTES // 2))
    parts = pack.pack(content, tmp_path / "parts", ["32k"])
    assert [part.name for part in parts] == ["proof.tgz.00"]
    assert len(pack.pack(content, tmp_path / "parts", ["2k", "8k", "32k"])) == 2
    with pytest.raises(ValueError, match="--weights 128k is no finished stage; finished are: 2k, 8k, 32k"):
        pack.pack(content, tmp_path / "parts", ["128k"])


def test_tasks_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tasks = of_two(tmp_path, monkeypatch)
    kept = [task.name for task in proof.chosen(list(tasks.values()), None, ["yarn", "pose"])]
    assert set(tasks) - set(kept) == {"yarn", "pose"}
    assert [task.name for task in proof.chosen(list(tasks.values()), ["main", "yarn"], ["yarn"])] == ["main"]
