"""A recipe of two stages, and a stand-in for the launcher that its commands need."""

import json
from pathlib import Path

import yaml
from transformers import AutoConfig

from easyctx import cli
from easyctx.recipe import final
from easyctx.recipe.check import check_recipe
from easyctx.recipe.read import Recipe
from easyctx.recipe.run import check_done, run_recipe
from easyctx.training.card import RUN_CARD
from easyctx.training.flags import parse_arguments
from easyctx.training.model import set_rope
from tests.train_helpers import LENGTH, make_inputs


def recipe_inputs(folder: Path) -> Path:
    """What `recipe_contents` names: a model, rows and a text."""
    make_inputs(folder, vocab_size=512)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("The cat sat on the mat. " * 200)
    return folder


def recipe_contents(inputs: Path, output: Path) -> dict:
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


def write_recipe(folder: Path, content: dict) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


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


def checked_run(recipe: Recipe, launcher: StandIn, **kwargs: object) -> None:
    check_recipe(recipe, kwargs.get("start"))
    check_done(recipe, kwargs.get("start"))
    run_recipe(recipe, launcher=launcher, **kwargs)
