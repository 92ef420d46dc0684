"""A recipe's YAML file, read and named: every key is known, every value is one that the train loop takes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from easyctx.data.settings import DataSettings
from easyctx.recipe.words import RaisingParser, data_words, flag_words, parse_data
from easyctx.training.config import TrainConfig
from easyctx.training.flags import parse_arguments

# What an adapter keeps through all stages that train it on.
ADAPTER_KEYS = ("lora_r", "lora_alpha", "lora_targets", "lora_train")
# What the recipe itself decides of the train loop's flags.
OWN_FLAGS = ("model", "output_dir", "resume", "overwrite")
TRAIN_KEYS = tuple(f.name for f in fields(TrainConfig) if f.name not in OWN_FLAGS)
LAUNCH_KEYS = ("processes", "nodes", "engine")
DATA_KEYS = tuple(f.name for f in fields(DataSettings) if f.name not in ("output", "overwrite"))
PLAN_KEYS = ("gpu", "gpu_memory", "host_memory")
RECIPE_KEYS = ("model", "output", "about", "result", "plan", "every_stage", "stages", "final")
STAGE_KEYS = ("name", "data", *LAUNCH_KEYS, *TRAIN_KEYS)
FINAL_KEYS = ("rope_theta",)
STAGE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Stage:
    """One run of the train loop.

    processes: of all nodes together, one a GPU. engine: a file of accelerate_configs without its ending, or a path.
    flags: of the train loop, without those that the recipe decides. config: the same, parsed; its model is the one
    that the stage starts from, which need not be there yet.
    data: what `easyctx data` is asked for, if the stage's data is to be made.
    """

    name: str
    processes: int
    nodes: int
    engine: str
    flags: dict[str, Any]
    config: TrainConfig
    data: DataSettings | None = None

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)


@dataclass(frozen=True)
class Recipe:
    """A file's content. final_rope_theta: the base that the finished model's config.json is given."""

    file: str
    model: str
    output: Path
    stages: list[Stage]
    about: str = ""
    result: str = "not run"
    final_rope_theta: float | None = None
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
        return self.stages[-1].output if self.final_rope_theta is None else self.output / "final"


def read_recipe(file: str) -> Recipe:
    """Raises ValueError naming the file, the stage and the key of whatever is wrong."""
    content = _load(file)
    _check_keys(content, RECIPE_KEYS, file)
    for name in ("model", "output"):
        if not isinstance(content.get(name), str):
            raise ValueError(f"{file} has no `{name}:`, a text")
    listed = content.get("stages")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{file} has no `stages:`, a list of them")
    common = _mapping(content, "every_stage", STAGE_KEYS, file)
    final = _mapping(content, "final", FINAL_KEYS, file)
    plan = _mapping(content, "plan", PLAN_KEYS, file)
    stages: list[Stage] = []
    for number, entry in enumerate(listed, start=1):
        where = f"{file}, stage {number}"
        _check_keys(entry, STAGE_KEYS, where)
        # A stage's own data takes the place of the common one, whichever way each is given.
        other = {"data": "dataset", "dataset": "data"}
        shared = {key: value for key, value in common.items() if other.get(key) not in entry}
        stages.append(_stage({**shared, **entry}, where, content["model"], Path(content["output"]), stages))
    return Recipe(
        file=file,
        model=content["model"],
        output=Path(content["output"]),
        stages=stages,
        about=str(content.get("about", "")).strip(),
        result=str(content.get("result", "not run")).strip(),
        final_rope_theta=_positive(final["rope_theta"], f"{file}, final: rope_theta") if final else None,
        plan=plan,
    )


def _load(file: str) -> dict[str, Any]:
    import yaml  # accelerate and transformers need it too

    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file} is no file: name a recipe such as train_scripts/llama2_7b_512k.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold `model:`, `output:` and `stages:`")
    return content


def _mapping(content: dict[str, Any], name: str, known: Iterable[str], file: str) -> dict[str, Any]:
    given = content.get(name, {})
    _check_keys(given, known, f"{file}, {name}")
    return dict(given)


def _check_keys(given: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} is no mapping of keys to values")
    known = tuple(known)
    for key in given:
        if key in known:
            continue
        if key in OWN_FLAGS:
            raise ValueError(f"{where}: `{key}` is not for a stage: the recipe itself decides it")
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown key `{key}`; the nearest known one is `{near}`")


def _stage(given: dict[str, Any], where: str, model: str, output: Path, before: list[Stage]) -> Stage:
    name = str(given.get("name", ""))
    if not STAGE_NAME.fullmatch(name) or name in ("data", "final"):
        raise ValueError(
            f"{where}: the name {name!r} cannot be a folder's here: give `name:` letters, digits, '.', '_' or '-', and "
            "not data or final"
        )
    if name in [stage.name for stage in before]:
        raise ValueError(f"{where}: an earlier stage has the name {name!r}, too")
    where = f"{where} ({name})"
    for key in ("seq_length", "max_train_steps", "processes", "engine"):
        if key not in given:
            raise ValueError(f"{where} has no `{key}:` (give it there or under every_stage)")
    if ("data" in given) == ("dataset" in given):
        raise ValueError(
            f"{where}: give either `dataset:`, a folder of `easyctx data` or a hub name, or `data:`, what to make it of"
        )
    counts = {key: _count(given.get(key, 1), f"{where}: {key}") for key in ("processes", "nodes")}
    settings = None
    if "data" in given:
        settings = _data(given["data"], where, model, given["seq_length"], output / "data" / name, before)
    flags = {key: given[key] for key in TRAIN_KEYS if key in given}
    if settings is not None:
        flags["dataset"] = settings.output
    if before:
        flags = _of_adapter(before[-1], flags, where) | flags
    whole = {
        "model": str(before[-1].output) if before else model,
        **flags,
        "output_dir": str(output / name),
        "resume": True,  # an interrupted stage goes on, a new one starts, a finished one says so
    }
    try:
        config = parse_arguments(flag_words(whole), RaisingParser)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Stage(name, counts["processes"], counts["nodes"], str(given["engine"]), whole, config, settings)


def _of_adapter(last: Stage, flags: dict[str, Any], where: str) -> dict[str, Any]:
    """The flags of the adapter that a stage goes on with; ValueError where it asks for another one."""
    kept = {key: last.flags[key] for key in ADAPTER_KEYS if key in last.flags}
    for key in ADAPTER_KEYS if last.config.lora_r else ():
        if key in flags and flags[key] != kept.get(key):
            raise ValueError(
                f"{where}: {key} is {flags[key]}, and the adapter of stage {last.name}, which it goes on with, has "
                f"{kept.get(key)}: leave it out, or merge that adapter and begin another recipe from the merged weights"
            )
    return kept


def _data(given: Any, where: str, model: str, seq_length: Any, output: Path, before: list[Stage]) -> DataSettings:
    """The settings of `easyctx data`; an earlier stage's folder where it is made of the same."""
    _check_keys(given, DATA_KEYS, f"{where}, data")
    inputs = given.get("inputs", ())
    values = {"tokenizer": model, "seq_length": seq_length, **given}
    values["inputs"] = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if not values["inputs"] and "mix" not in given:
        raise ValueError(f"{where}, data: name the texts as `inputs:`, a list, or a `mix:` file")
    settings = DataSettings(**values, output=str(output))
    try:
        settings = parse_data(data_words(settings))
    except ValueError as error:
        raise ValueError(f"{where}, data: {error}") from None
    for stage in before:
        if stage.data is not None and same_data(stage.data, settings):
            return stage.data
    return settings


def same_data(one: DataSettings, other: DataSettings) -> bool:
    """Whether both make the same rows."""
    beside = ("output", "overwrite", "num_proc")
    names = [f.name for f in fields(DataSettings) if f.name not in beside]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where} is {value!r}, and must be a whole number from 1")
    return value


def _positive(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not number > 0:
        raise ValueError(f"{where} is {value!r}, and must be a positive number")
    return number
