"""Recipes: what they run and in what order, what they skip, resume and begin anew."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from easyctx import cli
from easyctx.recipe.commands import Node, train_command
from easyctx.recipe.read import read_recipe
from easyctx.recipe.record import Record
from easyctx.recipe.run import StageFailed, check_done, run_recipe
from easyctx.recipe.script import script
from easyctx.training.card import RUN_CARD
from tests.recipe_helpers import StandIn, checked_run, recipe_contents, write_recipe
from tests.train_helpers import LENGTH, ROOT


def test_stages_follow_one_another_and_the_record_tells_of_them(recipe, tmp_path):
    launcher = StandIn()
    checked_run(recipe, launcher)
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
    checked_run(recipe, StandIn())
    assert AutoConfig.from_pretrained(recipe.final).rope_parameters["rope_theta"] == 1e6
    assert AutoConfig.from_pretrained(recipe.stages[-1].output).rope_parameters["rope_theta"] == 1e5
    assert (recipe.final / "model.safetensors").read_bytes() == b"long"
    assert "1000000.0" in (recipe.final / "README.md").read_text().replace("1e6", "1000000.0")
    assert not list(recipe.output.glob(".*"))


def test_a_failed_stage_ends_the_recipe_which_goes_on_from_there(recipe):
    with pytest.raises(StageFailed, match="stage long ended with exit status 3") as failure:
        checked_run(recipe, StandIn(fails="long"))
    assert failure.value.status == 3
    saved = recipe.stages[1].output / "checkpoints" / "step_00000001"
    assert f"(the same command without --from goes on from {saved})" in str(failure.value)
    record = Record(recipe)
    assert [row["state"] for row in record.rows()] == ["finished", "begun"]

    again = StandIn()
    checked_run(recipe, again)
    assert again.ran == ["long", "final"], "neither the finished stage nor its data is made twice"
    assert [launch["status"] for launch in Record(recipe).launches["long"]] == [0, 3, 0]
    assert "--resume" in train_command(recipe.stages[1]).words

    done = StandIn()
    checked_run(recipe, done)
    assert done.ran == []


def test_rows_of_a_finished_stage_may_be_gone_but_not_of_one_that_begins_anew(recipe_folder, tmp_path):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["stages"][0]["dataset"] = str(shutil.copytree(recipe_folder / "data", tmp_path / "rows"))
    recipe = read_recipe(write_recipe(tmp_path, content))
    with pytest.raises(StageFailed):
        checked_run(recipe, StandIn(fails="long"))
    shutil.rmtree(tmp_path / "rows")
    checked_run(recipe, StandIn())
    with pytest.raises(ValueError, match="stage short: dataset .*rows: there is no such folder"):
        checked_run(recipe, StandIn(), start="short")


def test_a_stage_that_ends_well_but_early_is_not_taken_for_finished(recipe):
    with pytest.raises(StageFailed, match="stage short ended early"):
        run_recipe(recipe, launcher=lambda argv: 0)


def test_from_begins_anew_and_keeps_what_was_there(recipe):
    checked_run(recipe, StandIn())
    again = StandIn()
    checked_run(recipe, again, start="long")
    assert again.ran == ["long", "final"]
    assert (recipe.output / "long.before_1" / RUN_CARD).exists()
    with pytest.raises(ValueError, match="no such stage; its stages are short, long"):
        check_done(recipe, "longer")


def test_from_needs_the_stages_before_it(recipe):
    with pytest.raises(ValueError, match="--from long needs the weights of stage short, which is not finished"):
        check_done(recipe, "long")


def test_stages_of_the_same_data_share_its_folder(recipe_folder, tmp_path):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["stages"].append(content["stages"][1] | {"name": "longer"})
    recipe = read_recipe(write_recipe(tmp_path, content))
    assert recipe.stages[2].config.dataset == recipe.stages[1].config.dataset
    launcher = StandIn()
    checked_run(recipe, launcher)
    assert launcher.ran == ["short", "data", "long", "longer", "final"]
    assert script(recipe).count("easyctx data ") == 1


def test_a_stage_of_its_own_data_leaves_the_common_one(recipe_folder, tmp_path):
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["every_stage"]["dataset"] = content["stages"][0].pop("dataset")
    short, long = read_recipe(write_recipe(tmp_path, content)).stages
    assert (short.config.dataset, long.config.dataset) == (str(recipe_folder / "data"), str(tmp_path / "out/data/long"))


def test_another_node_runs_the_stages_and_nothing_else(recipe, tmp_path):
    node = Node("1", "10.0.0.1", "29500")
    checked_run(recipe, StandIn(fails=None))
    (recipe.output / "recipe.json").unlink()
    launcher = StandIn()
    run_recipe(recipe, node=node, start="long", launcher=launcher)
    assert launcher.ran == ["long"]
    assert not (recipe.output / "recipe.json").exists()


@pytest.mark.launch
def test_a_miniature_of_the_first_recipe_runs(recipe_folder, tmp_path, monkeypatch):
    """Two stages, one process and then a ring of two, and what comes out of them."""
    content = recipe_contents(recipe_folder, tmp_path / "out")
    content["every_stage"] |= {"learning_rate": "1e-3"}
    content["stages"][1] |= {"processes": 2, "parallel_mode": "zigzag_ring_attn"}
    file = write_recipe(tmp_path, content)
    monkeypatch.chdir(ROOT)
    assert cli.main(["recipe", file]) == 0
    recipe = read_recipe(file)
    short, long = Record(recipe).rows()
    assert (short["tokens"], long["tokens"]) == (2 * (LENGTH // 2), 2 * (LENGTH - 1))
    assert all(0 < row["last_loss"] < 10 and row["seconds"] > 0 for row in (short, long))
    model = AutoModelForCausalLM.from_pretrained(recipe.final)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    trained = load_file(recipe.stages[1].output / "model.safetensors")
    start = load_file(recipe_folder / "model" / "model.safetensors")
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in trained.items())
    assert any(not torch.equal(trained[name], tensor) for name, tensor in start.items())
