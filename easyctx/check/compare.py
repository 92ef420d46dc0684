"""From traces to a verdict: errors of losses and gradients against what they may be."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from easyctx.check.steps import Trace

# A gradient that is zero but for rounding is measured against this part of the whole gradient's norm.
FLOOR = 1e-4
WHOLE = "all parameters together"


@dataclass(frozen=True)
class StepLoss:
    """One step's mean loss both ways, and the error of the sharded one."""

    step: int
    one_process: float
    sharded: float
    error: float
    limit: float
    exact: float | None = None  # in half precision: one process in float64

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class GradientError:
    """A parameter's relative gradient error in its worst step."""

    name: str
    step: int
    error: float
    limit: float
    one_process_error: float | None = None  # in half precision: one device's own, of the same step

    @property
    def excess(self) -> float:
        """Of the limit; above 1 is too much. NaN counts as infinite."""
        return self.error / self.limit if math.isfinite(self.error) else math.inf

    @property
    def holds(self) -> bool:
        return self.excess <= 1


@dataclass(frozen=True)
class Comparison:
    """All losses, all parameters (worst first), and the gradient as a whole."""

    losses: list[StepLoss]
    gradients: list[GradientError]
    whole: GradientError

    @property
    def holds(self) -> bool:
        return all(x.holds for x in self.losses) and all(e.holds for e in (*self.gradients, self.whole))


def compare(sharded: Trace, one_process: Trace, tolerance: float) -> Comparison:
    """Sharded steps against one process in the same dtype: relative errors against one tolerance."""
    losses = [
        StepLoss(step, want, got, _relative(got, want), tolerance)
        for step, (got, want) in enumerate(zip(sharded.losses, one_process.losses, strict=True), 1)
    ]
    errors = [_errors(got, want) for got, want in zip(sharded.gradients, one_process.gradients, strict=True)]
    found = {
        name: _worst([GradientError(name, step, e[name], tolerance) for step, e in enumerate(errors, 1)])
        for name in errors[0]
    }
    return _comparison(losses, found)


def compare_half(sharded: Trace, one_process: Trace, exact: Trace, factor: float, epsilon: float) -> Comparison:
    """Half precision: the sharded error against float64 may be `factor` times that of one device in that dtype.

    The error of a gradient with n entries is itself known to one part in sqrt(n) only, so a single parameter may
    have a factor 1 + 3 / sqrt(n) more, and is not held to less than the error of the gradient as a whole. A loss is
    one number, which one device may hit by luck: it is not held to less than `epsilon`, the dtype's own.
    """
    losses = []
    for step, (got, one, want) in enumerate(zip(sharded.losses, one_process.losses, exact.losses, strict=True), 1):
        limit = factor * max(_relative(one, want), epsilon)
        losses.append(StepLoss(step, one, got, _relative(got, want), limit, want))
    by_name: dict[str, list[GradientError]] = {}
    for step, right in enumerate(exact.gradients, 1):
        errors = _errors(sharded.gradients[step - 1], right)
        own_errors = _errors(one_process.gradients[step - 1], right)
        for name, error in errors.items():
            own = own_errors[name]
            if name == WHOLE:
                limit = factor * own
            else:
                limit = factor * (1 + 3 / right[name].numel() ** 0.5) * max(own, own_errors[WHOLE])
            by_name.setdefault(name, []).append(GradientError(name, step, error, limit, own))
    return _comparison(losses, {name: _worst(errors) for name, errors in by_name.items()})


def _comparison(losses: list[StepLoss], found: dict[str, GradientError]) -> Comparison:
    whole = found.pop(WHOLE)
    return Comparison(losses, sorted(found.values(), key=lambda e: e.excess, reverse=True), whole)


def _worst(errors: list[GradientError]) -> GradientError:
    return max(errors, key=lambda e: e.excess)


def _relative(got: float, want: float) -> float:
    return abs(got - want) / abs(want) if want else abs(got)


def _errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors by parameter, and under WHOLE of the gradient as a whole."""
    norms = {name: want[name].double().norm() for name in want}
    differences = {name: (got[name].double() - want[name].double()).norm() for name in want}
    norm = torch.stack(list(norms.values())).norm()
    floor = (FLOOR * norm).clamp_min(1e-30)
    errors = {name: float(differences[name] / norms[name].clamp_min(floor)) for name in want}
    return errors | {WHOLE: float(torch.stack(list(differences.values())).norm() / norm.clamp_min(1e-30))}


def as_json(value: Any) -> Any:
    """Numbers that JSON has no word for as None."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
