"""How far a run has come: what a checkpoint keeps beside weights, optimizer and random numbers."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


class TrainingStopped(RuntimeError):
    """A run that cannot usefully go on; the message says why and what to do."""


@dataclass
class Progress:
    """Counters of a run.

    step: optimizer steps behind it, those that were skipped among them.
    samples: sequences that all ranks together have seen, over all epochs (`GlobalOrder`).
    skipped, skipped_in_a_row: steps left out because loss or gradient was not finite.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    first_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)

    def count(self, num_samples: int, loss: float, grad_norm: float | None, max_skipped: int) -> None:
        """Count a finished step.

        Raises:
            TrainingStopped: more than `max_skipped` steps in a row were not finite.
        """
        self.step += 1
        self.samples += num_samples
        if is_finite(loss, grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > max_skipped:
            raise TrainingStopped(
                f"step {self.step}: loss {loss} and gradient norm {grad_norm} are not finite, nor were they before: "
                f"{self.skipped_in_a_row} steps in a row were skipped, and --max-skipped-steps is {max_skipped}. The "
                "weights are those from before. Lower --learning-rate or look at the data of these steps; --resume "
                "goes on from the last checkpoint"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_finite(loss: float, grad_norm: float | None) -> bool:
    """Whether a step may be taken. The norm is None where an engine does not tell it."""
    return math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
