"""Recipes: what they run and in what order, what they skip, resume and refuse, and the shipped ones."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from easyctx import cli
from easyctx.recipe import final
from easyctx.recipe.check import check_recipe
from easyctx.recipe.commands import Command, Node, train_command
from easyctx.recipe.predict import predict
from easyctx.recipe.process import Interrupted, run_process
from easyctx.recipe.read import Recipe, read_recipe
from easyctx.recipe.record import Record
from easyctx.recipe.run import StageFailed, check_done, run_recipe
from easyctx.recipe.script import script
from easyctx.training.card import RUN_CARD
from easyctx.training.flags import parse_arguments
from easyctx.training.model import set_rope, set_yarn
from tests.models import tiny_config
from tests.train_helpers import LENGTH, ROOT, make_inputs

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SHIPPED = sorted((ROOT / "train_scripts").glob("*.yaml"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), vocab_size=512)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("The cat sat on the mat. " * 200)
    return folder


def contents(inputs: Path, output: Path) -> dict:
    """Two stages, the second on data that the recipe makes, and a last RoPE base."""
    short = dict(name="short", dataset=str(inputs / "data"), seq_length=LENGTH // 2, rope_theta="2e4")
    long = dict(name="long", data={"inputs": str(inputs / "text")}, seq_length=LENGTH - 1, rope_theta="1e5")
    long["learning_rate"] = 1e-3
    return {
        "model": str(inputs / "model"),
        "output": str(output),
        "every_stage": {
            "processes": 1,
            "engine": "cpu",
            "tracker": "none",
            "gradient_accumulate_every": 1,
            "max_train_steps": 2,
        },
        "stages": [short, long],
        "final": {"rope_theta": 1e6},
    }


def write(folder: Path, content: dict) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def recipe(inputs: Path, tmp_path: Path) -> Recipe:
    return read_recipe(write(tmp_path, contents(inputs, tmp_path / "out")))


class StandIn:
    """Takes commands in place of a launcher: leaves what each would leave, and keeps their words."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails = fails
        self.ran: list[str] = []
        self.starts: dict[str, str] = {}

    def __call__(self, argv: list[str]) -> int:
        if "easyctx.train" in argv:
            return self.train(argv[argv.index("easyctx.train") + 1 :])
        if "easyctx.recipe.final" in argv:
            self.ran.append("final")
            return final.main(argv[3:])
        self.ran.append("data")
        return cli.main(argv[3:])

    def train(self, words: list[str]) -> int:
        config = parse_arguments(words)
        output = Path(config.output_dir)
        self.ran.append(output.name)
        self.starts[output.name] = config.model
        if output.name == self.fails:
            (output / "checkpoints" / "step_00000001").mkdir(parents=True)
            return 3
        model_config = AutoConfig.from_pretrained(config.model)
        set_rope(model_config, config.rope_theta, config.seq_length)
        output.mkdir(parents=True, exist_ok=True)
        model_config.save_pretrained(output)
        (output / "model.safetensors").write_bytes(output.name.encode())
        sequences = config.max_train_steps * config.batch_size
        stage = {"from": config.model, "dataset": "d", "seq_length": config.seq_length, "rope_theta": config.rope_theta}
        stage |= {"steps": config.max_train_steps, "sequences": sequences, "learning_rate": 1e-3, "mode": "m"}
        card = {"config": config.as_dict(), "steps": config.max_train_steps, "skipped_steps": 0}
        card |= {"first_step": {"loss": 5.0}, "last_step": {"loss": 4.0}}
        card |= {"stages": [{**stage, "mesh": "", "engine": "", "last_loss": 4.0}]}
        (output / RUN_CARD).write_text(json.dumps(card))
        return 0


def run(recipe: Recipe, launcher: StandIn, **kwargs: object) -> None:
    check_recipe(recipe, kwargs.get("start"))
    check_done(recipe, kwargs.get("start"))
    run_recipe(recipe, launcher=launcher, **kwargs)


def test_stages_follow_one_another_and_the_record_tells_of_them(recipe, tmp_path):
    launcher = StandIn()
    run(recipe, launcher)
    assert launcher.ran == ["short", "data", "long", "final"]
    assert launcher.starts == {"short": recipe.model, "long": str(tmp_path / "out" / "short")}

    record = json.loads((tmp_path / "out" / "recipe.json").read_text())
    (short, long) = record["stages"]
    assert (short["rope_theta"], short["steps"], short["tokens"]) == (2e4, 2, 2 * (LENGTH // 2))
    assert (long["first_loss"], long["last_loss"], long["state"]) == (5.0, 4.0, "finished")
    commands = [launch["command"] for launch in record["launches"]["long"]]
    assert commands[0].startswith("easyctx data ")
    assert commands[1].startswith("accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 1 ")
    assert all(launch["status"] == 0 and launch["seconds"] >= 0 for launch in record["launches"]["long"])
    table = (tmp_path / "out" / "recipe.md").read_text()
    assert f"| long | {LENGTH - 1} | 100000 | 2 | {2 * (LENGTH - 1)} | 5.0000 | 4.0000 |" in table


def test_the_finished_model_has_the_last_base_and_the_stage_keeps_its_own(recipe):
    run(recipe, StandIn())
    assert AutoConfig.from_pretrained(recipe.final).rope_parameters["rope_theta"] == 1e6
    assert AutoConfig.from_pretrained(recipe.stages[-1].output).rope_parameters["rope_theta"] == 1e5
    assert (recipe.final / "model.safetensors").read_bytes() == b"long"
    assert "1000000.0" in (recipe.final / "README.md").read_text().replace("1e6", "1000000.0")
    assert not list(recipe.output.glob(".*"))


def test_a_failed_stage_ends_the_recipe_which_goes_on_from_there(recipe):
    with pytest.raises(StageFailed, match="stage long ended with exit status 3") as failure:
        run(recipe, StandIn(fails="long"))
    assert failure.value.status == 3
    record = Record(recipe)
    assert [row["state"] for row in record.rows()] == ["finished", "begun"]

    again = StandIn()
    run(recipe, again)
    assert again.ran == ["long", "final"], "neither the finished stage nor its data is made twice"
    assert [launch["status"] for launch in Record(recipe).launches["long"]] == [0, 3, 0]
    assert "--resume" in train_command(recipe.stages[1]).words

    done = StandIn()
    run(recipe, done)
    assert done.ran == []


def test_rows_of_a_finished_stage_may_be_gone_but_not_of_one_that_begins_anew(inputs, tmp_path):
    content = contents(inputs, tmp_path / "out")
    content["stages"][0]["dataset"] = str(shutil.copytree(inputs / "data", tmp_path / "rows"))
    recipe = read_recipe(write(tmp_path, content))
    with pytest.raises(StageFailed):
        run(recipe, StandIn(fails="long"))
    shutil.rmtree(tmp_path / "rows")
    run(recipe, StandIn())
    with pytest.raises(ValueError, match="stage short: dataset .*rows: there is no such folder"):
        run(recipe, StandIn(), start="short")


def test_a_stage_that_ends_well_but_early_is_not_taken_for_finished(recipe):
    with pytest.raises(StageFailed, match="stage short ended early"):
        run_recipe(recipe, launcher=lambda argv: 0)


def test_from_begins_anew_and_keeps_what_was_there(recipe):
    run(recipe, StandIn())
    again = StandIn()
    run(recipe, again, start="long")
    assert again.ran == ["long", "final"]
    assert (recipe.output / "long.before_1" / RUN_CARD).exists()
    with pytest.raises(ValueError, match="no such stage; its stages are short, long"):
        check_done(recipe, "longer")


def test_from_needs_the_stages_before_it(recipe):
    with pytest.raises(ValueError, match="--from long needs the weights of stage short, which is not finished"):
        check_done(recipe, "long")


def test_a_finished_stage_of_other_settings_is_refused(recipe, inputs, tmp_path):
    run(recipe, StandIn())
    content = contents(inputs, tmp_path / "out")
    content["stages"][0]["learning_rate"] = 5e-5
    changed = read_recipe(write(tmp_path, content))
    with pytest.raises(ValueError, match="trained with learning_rate 2e-05, and the recipe says 5e-05: .*--from short"):
        check_done(changed, None)
    check_done(changed, "short")
    content["stages"][0]["learning_rate"] = 2e-5
    content["stages"][1]["data"]["eos"] = False
    with pytest.raises(ValueError, match="made with other settings than the recipe's `data:`"):
        check_done(read_recipe(write(tmp_path, content)), None)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (0, dict(seq_lenght=8), "unknown key `seq_lenght`; the nearest known one is `seq_length`"),
        (0, dict(output_dir="x"), "`output_dir` is not for a stage: the recipe itself decides it"),
        (0, dict(learning_rate="fast"), r"stage 1 \(short\): argument .*learning-rate.*'fast'"),
        (0, dict(parallel_mode="ring"), "invalid choice: 'ring'"),
        (0, dict(parallel_mode="ring_attn"), "stage short: ring_attn shares one sequence among 2 or more"),
        (0, dict(parallel_mode="ring_attn", processes=4, sp_degree=3), "stage short: .*3"),
        (0, dict(parallel_mode="ulysses_attn", processes=7), "stage short: .*heads"),
        (0, dict(processes=0), "processes is 0, and must be a whole number from 1"),
        (0, dict(processes=3, nodes=2), "3 processes do not divide into 2 nodes"),
        (0, dict(processes=2, nodes=2), "engine cpu is for 1 node, and the stage has `nodes: 2`"),
        (0, dict(engine="zero4"), "engine zero4: there is no accelerate_configs/zero4.yaml; there are cpu, ddp"),
        (0, dict(dataset="/nowhere/rows"), "there is no such folder. Make it with `easyctx data TEXT --tokenizer"),
        (0, dict(seq_length=5 * LENGTH), f"its first row has {LENGTH} tokens, and seq_length is {5 * LENGTH}"),
        (0, dict(max_train_steps=0), "--max-train-steps is 0"),
        (0, dict(rope_scaling="yarn"), "--rope-scaling is yarn and --rope-factor None: give both or neither"),
        (0, dict(rope_scaling="yarn", rope_factor=1, pose_length=9999), "give at least"),
        (0, dict(name="data"), "the name 'data' cannot be a folder's here"),
        (
            0,
            dict(lora_r=4, quantize="nf4", engine="zero3"),
            "--quantize nf4 does not go with engine zero3",
        ),
        (0, dict(lora_r=4, optimizer="adamw_8bit", engine="fsdp2"), "--optimizer adamw_8bit does not go with engine"),
        (1, dict(name="short"), "an earlier stage has the name 'short', too"),
        (1, dict(dataset="x/y"), "give either `dataset:`"),
        (1, dict(data={"inputs": "/nowhere/text"}), "/nowhere/text is no file or folder here"),
        (1, dict(data={"inputs": "x/y", "lenght": 3}), "stage 2 .long., data: unknown key `lenght`"),
        (1, dict(data={"inputs": "x/y", "seq_length": 8}), "rows of 8 tokens are shorter than the stage's"),
    ],
)
def test_mistakes_are_named_before_anything_runs(inputs, tmp_path, stage, change, message):
    content = contents(inputs, tmp_path / "out")
    content["stages"][stage] |= change
    with pytest.raises(ValueError, match=message):
        check_recipe(read_recipe(write(tmp_path, content)))
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_file_itself(inputs, tmp_path, capsys):
    content = contents(inputs, tmp_path / "out")
    for change, message in (
        ({"stage": []}, "unknown key `stage`; the nearest known one is `stages`"),
        ({"stages": []}, "has no `stages:`, a list of them"),
        ({"model": "/nowhere"}, "model: /nowhere is no folder here, and it is no hub name"),
        ({"final": {"rope_theta": 0}}, "rope_theta is 0, and must be a positive number"),
        ({"plan": {"gpus": 8}}, "unknown key `gpus`; the nearest known one is `gpu`"),
    ):
        assert cli.main(["recipe", write(tmp_path, content | change)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["recipe", str(tmp_path / "none.yaml")]) == 2
    assert "is no file: name a recipe" in capsys.readouterr().err
    engine = {"every_stage": content["every_stage"] | {"engine": "ddp", "processes": 64}}
    assert cli.main(["recipe", write(tmp_path, content | engine)]) == 2
    assert "64 processes of engine ddp on this machine need a GPU each" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands_and_runs_nothing(inputs, tmp_path, capsys):
    content = contents(inputs, tmp_path / "out")
    content["plan"] = {"gpu": "h100"}
    content["stages"][1] |= {"engine": "zero3", "processes": 2, "parallel_mode": "zigzag_ring_attn"}
    assert cli.main(["recipe", write(tmp_path, content), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("accelerate launch") == 2
    assert f"--model {tmp_path}/out/short --" in said
    assert "  easyctx data " in said
    assert "predicted" in said.split("long:")[1]
    assert "not predicted for all stages" in said, "the plan knows nothing of the CPU"
    assert not (tmp_path / "out").exists()


def test_an_adapter_stays_the_same_through_the_stages(inputs, tmp_path):
    content = contents(inputs, tmp_path / "out")
    content["plan"] = {"gpu": "h100"}
    for stage in content["stages"]:
        stage["engine"] = "ddp"
    full = read_recipe(write(tmp_path, content)).stages
    content["stages"][0] |= dict(lora_r=4, lora_targets=["q_proj", "v_proj"])
    content["stages"][1] |= dict(quantize="nf4")
    recipe = read_recipe(write(tmp_path, content))
    check_recipe(recipe)
    words = str(train_command(recipe.stages[1]))
    assert "--lora-r 4 --lora-targets q_proj v_proj" in words
    assert "--quantize nf4" in words
    for stage, of_all in zip(recipe.stages, full, strict=True):
        with_adapters, without = predict(recipe, stage), predict(recipe, of_all)
        assert with_adapters.gpu_peak < without.gpu_peak, "gradients and Adam's moments are those of the adapters"
    content["stages"][1] |= dict(lora_r=8)
    with pytest.raises(ValueError, match="stage 2 .long.: lora_r is 8, and the adapter of stage short.*has 4: leave"):
        read_recipe(write(tmp_path, content))


def test_what_a_stage_says_of_kernels_and_optimizer_is_predicted(inputs, tmp_path):
    content = contents(inputs, tmp_path / "out")
    content["plan"] = {"gpu": "h100"}
    content["every_stage"] |= dict(engine="ddp", batch_size=64)
    plain = read_recipe(write(tmp_path, content))
    content["every_stage"] |= dict(liger=True, optimizer="muon")
    changed = read_recipe(write(tmp_path, content))
    for before, after in zip(plain.stages, changed.stages, strict=True):
        assert "--liger" in str(train_command(after))
        stock, liger = predict(plain, before), predict(changed, after)
        assert liger.gpu_peak < stock.gpu_peak, "norms keep less, and Muon one momentum"


def test_a_finished_stage_of_another_adapter_is_refused(inputs, tmp_path):
    content = contents(inputs, tmp_path / "out")
    content["stages"][0] |= dict(lora_r=4)
    run(read_recipe(write(tmp_path, content)), StandIn())
    check_done(read_recipe(write(tmp_path, content)), None)
    content["stages"][0] |= dict(lora_r=8)
    with pytest.raises(ValueError, match="was trained with lora_r 4, and the recipe says 8: begin it anew"):
        check_done(read_recipe(write(tmp_path, content)), None)


def test_stages_of_the_same_data_share_its_folder(inputs, tmp_path):
    content = contents(inputs, tmp_path / "out")
    content["stages"].append(content["stages"][1] | {"name": "longer"})
    recipe = read_recipe(write(tmp_path, content))
    assert recipe.stages[2].config.dataset == recipe.stages[1].config.dataset
    launcher = StandIn()
    run(recipe, launcher)
    assert launcher.ran == ["short", "data", "long", "longer", "final"]
    assert script(recipe).count("easyctx data ") == 1


def test_a_stage_of_its_own_data_leaves_the_common_one(inputs, tmp_path):
    content = contents(inputs, tmp_path / "out")
    content["every_stage"]["dataset"] = content["stages"][0].pop("dataset")
    short, long = read_recipe(write(tmp_path, content)).stages
    assert (short.config.dataset, long.config.dataset) == (str(inputs / "data"), str(tmp_path / "out/data/long"))


def test_another_node_runs_the_stages_and_nothing_else(recipe, tmp_path):
    node = Node("1", "10.0.0.1", "29500")
    run(recipe, StandIn(fails=None))
    (recipe.output / "recipe.json").unlink()
    launcher = StandIn()
    run_recipe(recipe, node=node, start="long", launcher=launcher)
    assert launcher.ran == ["long"]
    assert not (recipe.output / "recipe.json").exists()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_hold_and_their_scripts_are_what_they_say(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = str(file.relative_to(ROOT))
    recipe = read_recipe(name)
    check_recipe(recipe)
    written = file.with_suffix(".sh").read_text()
    assert written == script(recipe), f"write it again: easyctx recipe {name} --shell > {name[:-5]}.sh"
    assert "result: not run" in written
    assert "predicted by easyctx plan" in written
    assert "does not fit" not in written
    assert subprocess.run(["bash", "-n", str(file.with_suffix(".sh"))], check=False).returncode == 0


def test_the_7b_schedule_is_easycontexts():
    recipe = read_recipe(str(ROOT / "train_scripts" / "llama2_7b_512k.yaml"))
    configs = [stage.config for stage in recipe.stages]
    assert [c.rope_theta for c in configs] == [1e6, 5e6, 10e6, 25e6, 50e6, 100e6, 250e6]
    assert [c.max_train_steps for c in configs] == [1000, 1000, 500, 500, 150, 300, 90]
    assert [c.learning_rate for c in configs] == [2e-5] * 6 + [1e-5]
    assert recipe.final_rope_theta == 1e9
    for stage, c in zip(recipe.stages, configs, strict=True):
        sequences = stage.processes if c.parallel_mode == "data_parallel" else 1
        assert 1e6 <= sequences * c.batch_size * c.gradient_accumulate_every * c.seq_length <= 1.05e6


def test_a_signal_reaches_the_training_and_its_end_is_awaited(tmp_path):
    """As under a launcher, the training process is the command's child; the launcher itself hears nothing."""
    train = (
        "import signal, sys, time, pathlib\n"
        "def stop(number, _):\n"
        "    pathlib.Path(sys.argv[2]).write_text(str(number)); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[2] + '.ready').touch(); time.sleep(60)\n"
    )
    launch = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    said = tmp_path / "said"

    def interrupt() -> None:
        while not Path(f"{said}.ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        run_process([sys.executable, "-c", launch, train, "easyctx.train", str(said)])
    assert stopped.value.number == signal.SIGTERM
    assert said.read_text() == str(int(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_process([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_commands_run_with_this_python():
    assert Command(["easyctx", "data", "x"]).argv == [sys.executable, "-m", "easyctx.cli", "data", "x"]
    assert Command(["python", "-m", "x"]).argv == [sys.executable, "-m", "x"]


def yarn_frequencies(base: float, dim: int, original: int, factor: float) -> torch.Tensor:
    """By the paper (arXiv 2309.00071, 3.2): what turns over 32 times within the original length stays, what turns
    less than once is interpolated, with a ramp over the dimensions between."""
    theta = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return theta * kept + theta / factor * (1 - kept)


def test_yarn_is_the_papers_and_a_later_stage_counts_from_the_same_length():
    config = tiny_config("llama")
    original = config.max_position_embeddings
    for factor in (2, 8):
        set_yarn(config, factor, seq_length=factor * original)
        set_rope(config, 5e4, seq_length=factor * original)
        assert config.max_position_embeddings == factor * original
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
        want = yarn_frequencies(5e4, config.head_dim, original, factor)
        torch.testing.assert_close(rotary.inv_freq.double(), want, rtol=1e-5, atol=0)
        assert rotary.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)
    assert config.rope_parameters["original_max_position_embeddings"] == original
    with pytest.raises(ValueError, match=f"--rope-factor 8 of the {original:,} tokens .* give at least 16"):
        set_yarn(config, 8, seq_length=16 * original)
    for other in (tiny_config("gemma3_text"), tiny_config("llama", rope_parameters=LINEAR)):
        with pytest.raises(ValueError, match="--rope-scaling yarn cannot be put upon"):
            set_yarn(other, 4, seq_length=8)


@pytest.mark.launch
def test_a_miniature_of_the_first_recipe_runs(inputs, tmp_path, monkeypatch):
    """Two stages, one process and then a ring of two, and what comes out of them."""
    content = contents(inputs, tmp_path / "out")
    content["every_stage"] |= {"learning_rate": "1e-3"}
    content["stages"][1] |= {"processes": 2, "parallel_mode": "zigzag_ring_attn"}
    file = write(tmp_path, content)
    monkeypatch.chdir(ROOT)
    assert cli.main(["recipe", file]) == 0
    recipe = read_recipe(file)
    short, long = Record(recipe).rows()
    assert (short["tokens"], long["tokens"]) == (2 * (LENGTH // 2), 2 * (LENGTH - 1))
    assert all(0 < row["last_loss"] < 10 and row["seconds"] > 0 for row in (short, long))
    model = AutoModelForCausalLM.from_pretrained(recipe.final)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    trained = load_file(recipe.stages[1].output / "model.safetensors")
    start = load_file(inputs / "model" / "model.safetensors")
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in trained.items())
    assert any(not torch.equal(trained[name], tensor) for name, tensor in start.items())
