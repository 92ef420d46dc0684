"""The recipes that a proof runs: the given one, and controls made of its stages.

    python -m train_scripts.proof.recipes output/proof/recipes/main.yaml --steps 12 --length 8192

writes the controls beside it:

- yarn: from the short model to the last length at once, YaRN in place of another RoPE base.
- pose: from the short model, short rows with skipped positions, at a quarter of the extension's FLOPs. Both run in
  one process, so that on two GPUs each has its own.
- sp1, sp2: the first steps of the extension in one process, and again with the sequence over two.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from easyctx.evals.results import write_text

FOLDER = "recipes"  # below the output folder
CONTROLS = "controls"  # the same
NAMES = ("yarn", "pose", "sp1", "sp2")
PARITY = "parity"  # rows of sp1 and sp2
POSE_COST = 0.25
Content = dict[str, Any]


def load(file: Path) -> Content:
    """A recipe's YAML; ValueError where it is none."""
    if not file.is_file():
        raise ValueError(f"{file} is no file: name a recipe such as train_scripts/proof/proof.yaml")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.get("stages"):
        raise ValueError(f"{file} is no recipe: it has no stages")
    return content


def whole_stages(content: Content) -> list[Content]:
    return [{**content.get("every_stage", {}), **stage} for stage in content["stages"]]


def split(content: Content) -> tuple[list[Content], list[Content]]:
    """(stages that train the short model, stages that extend it): the first with a RoPE base begins the extension."""
    stages = whole_stages(content)
    first = next((number for number, stage in enumerate(stages) if "rope_theta" in stage), len(stages))
    if not 0 < first < len(stages):
        raise ValueError("the recipe needs a stage without rope_theta, and then stages with one")
    return stages[:first], stages[first:]


def main_recipe(content: Content, processes: int) -> Content:
    """The recipe for so many processes: they share the rows of the short stages, and the sequences of the others."""
    content = deepcopy(content)
    num_short = len(split(content)[0])
    for number, stage in enumerate(content["stages"]):
        stage["processes"] = processes
        if processes == 1:
            continue
        if number >= num_short:
            stage["parallel_mode"] = "zigzag_ring_attn"
        elif stage["batch_size"] % processes:
            raise ValueError(f"--processes is {processes}, no divisor of batch_size {stage['batch_size']}")
        else:
            stage["batch_size"] //= processes
    return content


def controls(content: Content, steps: int, length: int) -> dict[str, Content]:
    """Recipes by name. steps, length: of sp1 and sp2."""
    short, longer = split(content)
    first, last = ({**stage, "processes": 1, "parallel_mode": "data_parallel"} for stage in (longer[0], longer[-1]))
    yarn = {**last, "rope_scaling": "yarn", "rope_factor": -(-last["seq_length"] // short[-1]["seq_length"])}
    del yarn["rope_theta"]
    pose = {**first, "pose_length": last["seq_length"], "rope_theta": last["rope_theta"]}
    pose_steps = POSE_COST * sum(stage_flops(content, stage) for stage in longer)
    pose_steps /= stage_flops(content, {**first, "max_train_steps": 1})
    pose["max_train_steps"] = max(round(pose_steps), first.get("warmup_steps", 0) + 1)
    one = {**first, "batch_size": 1, "seq_length": length, "max_train_steps": steps, "warmup_steps": 0}
    one |= {"dataset": f"{content['output']}/rows/{PARITY}"}  # rows cut short may have nothing to learn
    one |= {"lr_schedule": "constant", "save_dtype": "auto"}
    two = {**one, "processes": 2, "parallel_mode": "zigzag_ring_attn"}
    return {name: _of_one(content, name, stage) for name, stage in zip(NAMES, (yarn, pose, one, two), strict=True)}


def _of_one(content: Content, name: str, stage: Content) -> Content:
    output = content["output"]
    model = f"{output}/{split(content)[0][-1]['name']}"
    return {"model": model, "output": f"{output}/{CONTROLS}/{name}", "stages": [{**stage, "name": name}]}


def control_model(out: Path, name: str) -> Path:
    """Where the model of a control is, below the output folder of a proof."""
    return out / CONTROLS / name / name


def stage_flops(content: Content, stage: Content) -> float:
    """Of forward and backward of all its steps, as the train loop counts them for MFU."""
    import torch
    from transformers import AutoModelForCausalLM

    from easyctx.training.flops import sequence_flops

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(content["model"]))
    sequences = stage["max_train_steps"] * stage["batch_size"] * stage["gradient_accumulate_every"]
    return sequences * sequence_flops(model, stage["seq_length"])


def write(content: Content, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(content, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="of sp1 and sp2")
    parser.add_argument("--length", type=int, required=True, help="tokens of their sequences")
    args = parser.parse_args()
    for name, control in controls(load(args.recipe), args.steps, args.length).items():
        write(control, args.recipe.with_name(f"{name}.yaml"))


if __name__ == "__main__":
    main()
