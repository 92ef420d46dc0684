"""Recipes: mistakes are named before anything runs; what a dry run says instead."""

import pytest

from easyctx import cli
from easyctx.recipe.check import check_recipe
from easyctx.recipe.commands import train_command
from easyctx.recipe.predict import predict
from easyctx.recipe.read import read_recipe
from easyctx.recipe.run import check_done
from tests.recipe_helpers import StandIn, checked_run, recipe_contents, write_recipe
from tests.train_helpers import LENGTH


def test_a_finished_stage_of_other_settings_is_refused(recipe, recipe_folder, tmp_path):
    checked_run(recipe, StandIn())
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["stages"][0]["learning_rate"] = 5e-5
    changed = read_recipe(write_recipe(tmp_path, content))
    with pytest.raises(ValueError, match="trained with learning_rate 2e-05, and the recipe says 5e-05: .*--from short"):
        check_done(changed, None)
    check_done(changed, "short")
    content["stages"][0]["learning_rate"] = 2e-5
    content["stages"][1]["data"]["eos"] = False
    with pytest.raises(ValueError, match="made with other settings than the recipe's `data:`"):
        check_done(read_recipe(write_recipe(tmp_path, content)), None)


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
def test_mistakes_are_named_before_anything_runs(recipe_folder, tmp_path, stage, change, message):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["stages"][stage] |= change
    with pytest.raises(ValueError, match=message):
        check_recipe(read_recipe(write_recipe(tmp_path, content)))
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_file_itself(recipe_folder, tmp_path, capsys):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    for change, message in (
        ({"stage": []}, "unknown key `stage`; the nearest known one is `stages`"),
        ({"stages": []}, "has no `stages:`, a list of them"),
        ({"model": "/nowhere"}, "model: /nowhere is no folder here, and it is no hub name"),
        ({"final": {"rope_theta": 0}}, "rope_theta is 0, and must be a positive number"),
        ({"plan": {"gpus": 8}}, "unknown key `gpus`; the nearest known one is `gpu`"),
    ):
        assert cli.main(["recipe", write_recipe(tmp_path, content | change)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["recipe", str(tmp_path / "none.yaml")]) == 2
    assert "is no file: name a recipe" in capsys.readouterr().err
    engine = {"every_stage": content["every_stage"] | {"engine": "ddp", "processes": 64}}
    assert cli.main(["recipe", write_recipe(tmp_path, content | engine)]) == 2
    assert "64 processes of engine ddp on this machine need a GPU each" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands_and_runs_nothing(recipe_folder, tmp_path, capsys):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["plan"] = {"gpu": "h100"}
    content["stages"][1] |= {"engine": "zero3", "processes": 2, "parallel_mode": "zigzag_ring_attn"}
    assert cli.main(["recipe", write_recipe(tmp_path, content), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("accelerate launch") == 2
    assert f"--model {tmp_path}/out/short --" in said
    assert "  easyctx data " in said
    assert "predicted" in said.split("long:")[1]
    assert "not predicted for all stages" in said, "the plan knows nothing of the CPU"
    assert not (tmp_path / "out").exists()


def test_an_adapter_stays_the_same_through_the_stages(recipe_folder, tmp_path):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["plan"] = {"gpu": "h100"}
    for stage in content["stages"]:
        stage["engine"] = "ddp"
    full = read_recipe(write_recipe(tmp_path, content)).stages
    content["stages"][0] |= dict(lora_r=4, lora_targets=["q_proj", "v_proj"])
    content["stages"][1] |= dict(quantize="nf4")
    recipe = read_recipe(write_recipe(tmp_path, content))
    check_recipe(recipe)
    words = str(train_command(recipe.stages[1]))
    assert "--lora-r 4 --lora-targets q_proj v_proj" in words
    assert "--quantize nf4" in words
    for stage, of_all in zip(recipe.stages, full, strict=True):
        with_adapters, without = predict(recipe, stage), predict(recipe, of_all)
        assert with_adapters.gpu_peak < without.gpu_peak, "gradients and Adam's moments are those of the adapters"
    content["stages"][1] |= dict(lora_r=8)
    with pytest.raises(ValueError, match="stage 2 .long.: lora_r is 8, and the adapter of stage short.*has 4: leave"):
        read_recipe(write_recipe(tmp_path, content))


def test_what_a_stage_says_of_kernels_and_optimizer_is_predicted(recipe_folder, tmp_path):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["plan"] = {"gpu": "h100"}
    content["every_stage"] |= dict(engine="ddp", batch_size=64)
    plain = read_recipe(write_recipe(tmp_path, content))
    content["every_stage"] |= dict(liger=True, optimizer="muon")
    changed = read_recipe(write_recipe(tmp_path, content))
    for before, after in zip(plain.stages, changed.stages, strict=True):
        assert "--liger" in str(train_command(after))
        stock, liger = predict(plain, before), predict(changed, after)
        assert liger.gpu_peak < stock.gpu_peak, "norms keep less, and Muon one momentum"


def test_a_finished_stage_of_another_adapter_is_refused(recipe_folder, tmp_path):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["stages"][0] |= dict(lora_r=4)
    checked_run(read_recipe(write_recipe(tmp_path, content)), StandIn())
    check_done(read_recipe(write_recipe(tmp_path, content)), None)
    content["stages"][0] |= dict(lora_r=8)
    with pytest.raises(ValueError, match="was trained with lora_r 4, and the recipe says 8: begin it anew"):
        check_done(read_recipe(write_recipe(tmp_path, content)), None)
