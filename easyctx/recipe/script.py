"""A recipe as a plain shell script that a person can read, and as what `--dry-run` prints."""

from __future__ import annotations

import textwrap

from easyctx.recipe.commands import Command, data_command, final_command, train_command
from easyctx.recipe.predict import Prediction, duration, predict
from easyctx.recipe.read import Recipe, Stage

NODES = [
    "# Run it on each node, in a folder that all share, with MACHINE_RANK=0, 1, … and the first node's address:",
    "#   MACHINE_RANK=0 FIRST_NODE=10.0.0.1 bash {script}",
]


def script(recipe: Recipe) -> str:
    """The same commands as the recipe's, each of which may be given again: what is finished is not done twice."""
    predictions = [predict(recipe, stage) for stage in recipe.stages]
    lines = ["#!/usr/bin/env bash", *_header(recipe, predictions), "set -euo pipefail", 'cd "$(dirname "$0")/.."']
    if any(stage.nodes > 1 for stage in recipe.stages):
        lines += [': "${MACHINE_RANK:?0 on the first node, 1 on the second, …}"', ': "${FIRST_NODE:?address}"']
        lines += ['PORT="${PORT:-29500}"']
    made: set[str] = set()
    for stage, prediction in zip(recipe.stages, predictions, strict=True):
        lines += ["", f"# {_stage_line(stage, prediction)}"]
        if stage.data is not None and stage.data.output not in made:
            made.add(stage.data.output)
            lines += [f"[ -e {stage.data.output} ] || \\", *_indented(data_command(stage))]
        lines += train_command(stage).lines()
    if (final := final_command(recipe)) is not None:
        lines += ["", "# The last RoPE base goes into the config alone; the weights are linked, not copied."]
        if any(stage.nodes > 1 for stage in recipe.stages):
            lines += ['[ "$MACHINE_RANK" != 0 ] || \\', *_indented(final)]
        else:
            lines += final.lines()
    return "\n".join(lines) + "\n"


def _header(recipe: Recipe, predictions: list[Prediction | None]) -> list[str]:
    text = [f"# {line}" for paragraph in recipe.about.splitlines() for line in textwrap.wrap(paragraph, 116)]
    last = recipe.stages[-1]
    nodes = f" on {last.nodes} nodes" if last.nodes > 1 else ""
    gpu, host = recipe.plan.get("gpu", "GPU"), recipe.plan.get("host_memory")
    memory = f", {host:g} GiB of host memory a node" if host is not None else ""
    shell = recipe.file.removesuffix(".yaml") + ".sh"
    lines = [*text, "#", f"# hardware: {last.processes} x {gpu}{nodes}{memory}", f"# time: {total(predictions)}"]
    lines += [f"# result: {recipe.result}", "#"]
    lines += [f"# Written by `easyctx recipe {recipe.file} --shell`; the recipe also resumes and keeps a table."]
    if last.nodes > 1:
        lines += [line.format(script=shell) for line in NODES]
    return lines


def total(predictions: list[Prediction | None]) -> str:
    """The time of all stages, in words that say it is predicted."""
    seconds = [each.seconds for each in predictions if each is not None and each.seconds is not None]
    if len(seconds) < len(predictions):
        return "not predicted for all stages"
    return f"about {duration(sum(seconds))}, predicted by easyctx plan from sizes and rates, not measured"


def _stage_line(stage: Stage, prediction: Prediction | None) -> str:
    config = stage.config
    base = "" if config.rope_theta is None else f", RoPE base {config.rope_theta:g}"
    scaled = "" if config.rope_factor is None else f", YaRN x {config.rope_factor:g}"
    told = "" if prediction is None else f": {prediction}"
    return f"{stage.name}: {config.seq_length:,} tokens{base}{scaled}, {config.max_train_steps:,} steps{told}"


def _indented(command: Command) -> list[str]:
    return [f"  {line}" for line in command.lines()]


def dry_run(recipe: Recipe) -> list[str]:
    """Every command with what is predicted of it."""
    predictions = [predict(recipe, stage) for stage in recipe.stages]
    lines, made = [], set()
    for stage, prediction in zip(recipe.stages, predictions, strict=True):
        lines += [_stage_line(stage, prediction)]
        if stage.data is not None and stage.data.output not in made:
            made.add(stage.data.output)
            lines += [f"  {data_command(stage)}"]
        lines += [f"  {train_command(stage)}", ""]
    if (final := final_command(recipe)) is not None:
        lines += ["final", f"  {final}", ""]
    return [*lines, f"time: {total(predictions)}"]
