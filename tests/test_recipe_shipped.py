"""The recipes that are shipped hold, and their scripts are what they say."""

import subprocess

import pytest

from easyctx.recipe.check import check_recipe
from easyctx.recipe.read import read_recipe
from easyctx.recipe.script import script
from tests.train_helpers import ROOT

SHIPPED = sorted((ROOT / "train_scripts").glob("*.yaml"))


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
