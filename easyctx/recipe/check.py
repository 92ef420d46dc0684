"""What is checked before the first stage starts: numbers, modes, heads, GPUs, engines, data, finished stages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from easyctx.adapters.settings import AdapterSettings, check_adapter_kind
from easyctx.capability import check_config
from easyctx.cost.models import load_shape_config
from easyctx.data.load import load_tokenised
from easyctx.hub_names import why_no_hub_name
from easyctx.modes import get_mode
from easyctx.recipe.commands import engine_file, engine_names
from easyctx.recipe.read import Recipe, Stage
from easyctx.training.card import is_finished
from easyctx.training.checkpoint_checks import check_can_write
from easyctx.training.config import TrainConfig, check_config_values
from easyctx.training.model import set_run_rope


def check_recipe(recipe: Recipe, start: str | None = None) -> list[str]:
    """Check every stage; returns what could not be looked at, in words.

    Args:
        start: stage to begin anew. The rows of finished stages before it need not be there any more.

    Raises:
        ValueError: the first thing that cannot work, naming the file and the stage.
    """
    check_can_write(str(recipe.output))
    shape, notes = _shape(recipe.model)
    # Sizes that are known for a hub's name are not its whole configuration: RoPE is that of a folder alone.
    rope = copy.deepcopy(shape) if Path(recipe.model).exists() else None
    anew = False
    for stage in recipe.stages:
        try:
            _check_launch(stage)
            _check_settings(stage, recipe.model, shape)
            if rope is not None:
                set_run_rope(rope, stage.config)  # each stage starts from what the last one left
            anew = anew or stage.name == start
            if anew or not is_finished(stage.config):
                notes += _check_data(stage)
        except ValueError as error:
            raise ValueError(f"{recipe.file}, stage {stage.name}: {error}") from None
    return list(dict.fromkeys(notes))


def check_machine(recipe: Recipe) -> None:
    """ValueError where this machine has not the GPUs that a stage's launch needs."""
    import torch

    there = torch.cuda.device_count()
    for stage in recipe.stages:
        needed = stage.processes // stage.nodes
        if engine_file(stage.engine).stem != "cpu" and there < needed:
            raise ValueError(
                f"{recipe.file}, stage {stage.name}: {needed} processes of engine {stage.engine} on this machine need "
                f"a GPU each, and there are {there}: lower `processes:`, or take `engine: cpu`"
            )


def _shape(model: str) -> tuple[Any, list[str]]:
    """The start model's sizes, and a note where they are not known here."""
    if not Path(model).exists() and (reason := why_no_hub_name(model)):
        raise ValueError(f"model: {model} is no folder here, and {reason}")
    try:
        return load_shape_config(model)[0], []
    except ValueError as error:
        if Path(model).exists():
            raise
        return None, [f"the heads of {model} were not checked: {error}"]


def _check_launch(stage: Stage) -> None:
    import yaml

    if stage.processes % stage.nodes:
        raise ValueError(f"{stage.processes} processes do not divide into {stage.nodes} nodes: `processes:` is of all")
    path = engine_file(stage.engine)
    if not path.is_file():
        raise ValueError(f"engine {stage.engine}: there is no {path}; there are {', '.join(engine_names())}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"engine {stage.engine}: {path} is not YAML: {error}") from error
    settings = settings if isinstance(settings, dict) else {}
    kind, adapters = str(settings.get("distributed_type")), AdapterSettings.from_config(stage.config)
    check_adapter_kind(adapters, stage.config.optimizer, kind, f"engine {stage.engine}")
    machines = settings.get("num_machines", 1)
    if (machines > 1) != (stage.nodes > 1):
        raise ValueError(
            f"engine {stage.engine} is for {machines} node{'s' if machines > 1 else ''}, and the stage has `nodes: "
            f"{stage.nodes}`: take the engine {'without' if machines > 1 else 'with'} _2nodes, or change the nodes"
        )


def _check_settings(stage: Stage, model: str, shape: Any) -> None:
    """What the train loop would refuse. A stage's own start model may not be there yet: the first one stands in."""
    config: TrainConfig = copy.deepcopy(stage.config)
    config.model = model
    degree = check_config_values(config, stage.processes)
    if shape is not None:
        check_config(shape, get_mode(config.parallel_mode), degree, config.ring_degree)


def _check_data(stage: Stage) -> list[str]:
    """Rows that are there must be long enough; those that are to be made, `easyctx data` checks itself."""
    length = stage.config.seq_length
    if stage.data is not None:
        if stage.data.seq_length < length:
            raise ValueError(
                f"data: rows of {stage.data.seq_length} tokens are shorter than the stage's seq_length {length}"
            )
        for source in stage.data.inputs:
            _check_source(source)
        return []
    dataset = stage.config.dataset
    if not Path(dataset).expanduser().exists() and why_no_hub_name(dataset) is None:
        return [f"the hub dataset {dataset} was not looked at"]
    if not Path(dataset).expanduser().exists():
        raise ValueError(
            f"dataset {dataset}: there is no such folder. Make it with `easyctx data TEXT --tokenizer "
            f"{stage.config.model} --seq-length {length} --output {dataset}`, or have the recipe make it with `data:`"
        )
    first = len(load_tokenised(dataset)[0]["input_ids"])
    if first < length:
        raise ValueError(f"dataset {dataset}: its first row has {first} tokens, and seq_length is {length}")
    return []


def _check_source(source: str) -> None:
    """ValueError for a text that is neither here nor a hub name, with or without a weight."""
    from easyctx.data.mix import parse_inputs

    (parsed,) = parse_inputs([source])
    if not Path(parsed.path).expanduser().exists() and (reason := why_no_hub_name(parsed.path)):
        raise ValueError(f"data: inputs: {parsed.path} is no file or folder here, and {reason}")
