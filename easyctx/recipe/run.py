"""Running a recipe: command after command, past what is finished, with a record of all of it."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyctx.adapters.prepare import adopt_adapter
from easyctx.data.folder import SUMMARY_NAME
from easyctx.recipe.commands import Command, Node, data_command, final_command, train_command
from easyctx.recipe.final import is_made
from easyctx.recipe.process import Interrupted, run_process
from easyctx.recipe.read import Recipe, Stage, same_data
from easyctx.recipe.record import Record, table
from easyctx.recipe.words import parse_data
from easyctx.training.card import is_finished, read_run_card
from easyctx.training.checkpoint_checks import OF_ADAPTERS
from easyctx.training.checkpoint_files import CHECKPOINTS, step_folders

# What makes a stage another one. Mode, memory and the like may change under a finished stage.
MUST_AGREE = (
    *("model", "dataset", "seq_length", "pose_length", "rope_theta", "rope_factor", "max_train_steps"),
    *("learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "batch_size", "gradient_accumulate_every"),
    *("seed", "ignore_borders", *OF_ADAPTERS),
)
Launcher = Callable[[list[str]], int]
POLL_SECONDS = 5.0


class StageFailed(RuntimeError):
    """A command ended with another exit status than 0, or without what it was to make."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def check_done(recipe: Recipe, start: str | None) -> None:
    """Look at what earlier calls left.

    Raises:
        ValueError: a finished stage or data set was made with other settings, `start` is no stage, or stages before
            it are not finished.
    """
    names = [stage.name for stage in recipe.stages]
    if start is not None and start not in names:
        raise ValueError(f"--from {start}: {recipe.file} has no such stage; its stages are {', '.join(names)}")
    kept = recipe.stages if start is None else recipe.stages[: names.index(start)]
    for stage in kept:
        if start is not None and not is_finished(stage.config):
            raise ValueError(f"--from {start} needs the weights of stage {stage.name}, which is not finished")
        _check_unchanged(recipe, stage)
    for stage in recipe.stages:
        if stage.data is not None:
            _check_made_data(stage)


def _check_unchanged(recipe: Recipe, stage: Stage) -> None:
    before, now = read_run_card(stage.output).get("config"), copy.deepcopy(stage.config)
    if not before:
        return
    adopt_adapter(now)  # as the run did
    for name in MUST_AGREE:
        was, is_now = before.get(name, OF_ADAPTERS.get(name)), getattr(now, name)
        if was != is_now:
            raise ValueError(
                f"{recipe.file}, stage {stage.name}: {stage.output} was trained with {name} {was}, and "
                f"the recipe says {is_now}: begin it anew with --from {stage.name}, or name another `output:`"
            )


def _check_made_data(stage: Stage) -> None:
    assert stage.data is not None
    summary = Path(stage.data.output) / SUMMARY_NAME
    if not summary.exists():
        return
    made = json.loads(summary.read_text(encoding="utf-8"))["settings"]
    if not same_data(_as_settings(made), stage.data):
        raise ValueError(
            f"stage {stage.name}: {stage.data.output} was made with other settings than the recipe's `data:` (see its "
            f"{SUMMARY_NAME}): remove that folder, or name another `output:`"
        )


def _as_settings(made: dict[str, Any]) -> Any:
    plain = parse_data(["x", "--tokenizer", "x", "--seq-length", "2", "--output", "x"])
    known = {name: value for name, value in made.items() if hasattr(plain, name)}
    return type(plain)(**{**known, "inputs": tuple(made["inputs"])})


def run_recipe(
    recipe: Recipe, *, start: str | None = None, node: Node | None = None, launcher: Launcher = run_process
) -> None:
    """Run what is not finished.

    Args:
        start: stage to begin anew, with all after it; what they left is set aside.
        node: which machine this is, of several. The first keeps the record and makes what is no stage.
        launcher: runs a command, its exit status.

    Raises:
        StageFailed: a command failed.
        Interrupted: by SIGTERM or SIGINT.
    """
    first = node is None or node.rank == "0"
    record = Record(recipe) if first else None
    names = [stage.name for stage in recipe.stages]
    anew = [] if start is None else names[names.index(start) :]
    if record is not None:
        _set_aside(recipe, [stage for stage in recipe.stages if stage.name in anew])
        record.forget(anew)
    for number, stage in enumerate(recipe.stages, start=1):
        say = f"stage {number} of {len(names)}, {stage.name}"
        # Another machine may look before the first has set aside what is there: it takes part in any case.
        if is_finished(stage.config) and not (stage.name in anew and not first):
            _say(f"{say}: finished already ({stage.output})")
            continue
        if stage.data is not None:
            _make_data(stage, record, launcher)
        _say(say)
        _run(stage.name, train_command(stage, node), record, launcher, stage.output)
        _wait_for_card(stage, first)
    if record is not None:
        _finish(recipe, record, launcher)


def _run(name: str, command: Command, record: Record | None, launcher: Launcher, output: Path | None = None) -> None:
    _say(str(command))
    if record is not None:
        record.begin(name, str(command))
    status: int | str = "killed"
    try:
        status = launcher(command.argv)
    except Interrupted as error:
        status = str(error)
        raise
    finally:
        if record is not None:
            record.end(name, status)
    if status != 0:
        raise StageFailed(f"stage {name} ended with exit status {status}{_way_on(output)}: {command}", int(status))


def _way_on(output: Path | None) -> str:
    """What to do about a stage that left a checkpoint in this folder, as one that was stopped from outside does."""
    saved = [] if output is None else step_folders(output / CHECKPOINTS)
    return f" (the same command without --from goes on from {saved[-1]})" if saved else ""


def _make_data(stage: Stage, record: Record | None, launcher: Launcher) -> None:
    assert stage.data is not None
    made = Path(stage.data.output) / SUMMARY_NAME
    if record is None:
        while not made.exists():
            _say(f"waiting for the first node to make {stage.data.output}")
            time.sleep(POLL_SECONDS)
    elif not made.exists():
        _say(f"data of stage {stage.name}")
        _run(stage.name, data_command(stage), record, launcher)


def _wait_for_card(stage: Stage, first: bool) -> None:
    """A stage that ended well is finished; another machine may see that a little later."""
    deadline = time.monotonic() + (0 if first else 600)
    while not is_finished(stage.config):
        if time.monotonic() >= deadline:
            raise StageFailed(
                f"stage {stage.name} ended early, before its last step, though with exit status 0. The same command "
                "without --from goes on with it",
                1,
            )
        time.sleep(POLL_SECONDS)


def _finish(recipe: Recipe, record: Record, launcher: Launcher) -> None:
    command, base = final_command(recipe), recipe.final_rope_theta
    if command is not None and base is not None and not is_made(recipe.stages[-1].output, recipe.final, base):
        _run("final", command, record, launcher)
    record.write()
    print("\n".join(["", *table(record.rows()), ""]))
    _say(f"the finished model is in {recipe.final}")


def _set_aside(recipe: Recipe, stages: list[Stage]) -> None:
    """Rename what stages that are begun anew have left; the final folder, made of them, goes."""
    for stage in stages:
        if stage.output.exists():
            taken = len(list(stage.output.parent.glob(f"{stage.name}.before_*")))
            aside = stage.output.with_name(f"{stage.name}.before_{taken + 1}")
            stage.output.rename(aside)
            _say(f"what was in {stage.output} is now in {aside}")
    if stages and recipe.final_rope_theta is not None:
        shutil.rmtree(recipe.final, ignore_errors=True)


def _say(text: str) -> None:
    print(f"easyctx: {text}", flush=True)
