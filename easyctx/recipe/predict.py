"""What `easyctx plan` predicts for the stages of a recipe. Nothing is run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from easyctx.cost import command as plan_command
from easyctx.cost.plan import PLAN_ENGINES, make_plan, step_name
from easyctx.memory.budget import GIB
from easyctx.recipe.commands import engine_file
from easyctx.recipe.read import Recipe, Stage
from easyctx.recipe.words import RaisingParser, flag_words


@dataclass(frozen=True)
class Prediction:
    """Of one stage. seconds: of all its steps; None where it does not fit. gpu_peak, host_peak: bytes."""

    seconds: float | None
    step_seconds: float | None
    gpu_peak: float
    host_peak: float
    longest: int

    def __str__(self) -> str:
        if self.seconds is None or self.step_seconds is None:
            return f"does not fit (predicted): the longest sequence that does has {self.longest:,} tokens"
        return (
            f"predicted {duration(self.seconds)} ({self.step_seconds:.3g} s a step), "
            f"{self.gpu_peak / GIB:.3g} GiB of a GPU, {self.host_peak / GIB:.3g} GiB of a host"
        )


def predict(recipe: Recipe, stage: Stage) -> Prediction | None:
    """None where the plan does not apply: no `plan:` in the recipe, an engine or a model that it does not know."""
    engine = engine_file(stage.engine).stem.removesuffix("_2nodes")
    if not recipe.plan or engine not in PLAN_ENGINES:
        return None
    try:
        plan = make_plan(plan_command.make_request(_arguments(recipe, stage, engine))[0])
    except ValueError:
        if recipe.model.count("/") == 1:
            return None  # a hub model whose sizes are not known here
        raise
    found = plan.decision or plan.closest
    assert found is not None
    step = plan.steps[step_name(plan.mode, plan.ring_degree)].seconds if plan.decision else None
    return Prediction(
        seconds=None if step is None else step * stage.config.max_train_steps,
        step_seconds=step,
        gpu_peak=found.predicted.gpu_peak,
        host_peak=found.predicted.host_peak,
        longest=plan.longest,
    )


def _arguments(recipe: Recipe, stage: Stage, engine: str) -> argparse.Namespace:
    parser = RaisingParser(prog="easyctx plan", allow_abbrev=False)
    plan_command.add_arguments(parser)
    config = stage.config
    flags = {
        "model": recipe.model,
        "gpus": stage.processes,
        "nodes": stage.nodes,
        "engine": engine,
        **recipe.plan,
        **{name: getattr(config, name) for name in ("seq_length", "parallel_mode", "ring_degree", "sp_degree")},
        **{name: getattr(config, name) for name in ("batch_size", "gradient_accumulate_every", "attn_kernel")},
        **{name: getattr(config, name) or None for name in ("lora_r", "lora_targets", "lora_train", "quantize")},
        **{name: getattr(config, name) for name in ("double_quant", "optimizer", "liger")},
    }
    return parser.parse_args(flag_words(flags))


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
