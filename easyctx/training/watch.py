"""What looks on while a run goes from step to step: signals, headway, the profiler."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack

from easyctx.mesh import Mesh, set_message_timeout
from easyctx.training.config import TrainConfig
from easyctx.training.heartbeat import Heartbeat
from easyctx.training.profile import StepProfiler
from easyctx.training.progress import Progress
from easyctx.training.stop import StopSignal

NEVER = 30 * 24 * 3600.0


class Watch(ExitStack):
    """Entered around a run's steps, by all ranks.

    stopped_by: the signal that ended the steps before the last one, on all ranks the same.
    """

    stopped_by: signal.Signals | None = None

    def __init__(self, config: TrainConfig, progress: Progress, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.progress = config, progress
        set_message_timeout(mesh, message_timeout(config.hang_timeout))
        self.stop = self.enter_context(StopSignal())
        self.enter_context(Heartbeat(progress, config.hang_timeout))
        self.profiler = StepProfiler(config, self.stop.ranks.rank)
        self.callback(self.profiler.close)

    def steps(self) -> Iterator[int]:
        """The steps to take, from 0, until the last one or a signal; each is to be counted in `progress`."""
        while self.progress.step < self.config.max_train_steps:
            if self.stop.agreed():
                self.stopped_by = signal.Signals(self.stop.received)
                return
            self.profiler.before_step(self.progress.step + 1)
            yield self.progress.step
            self.profiler.after_step(self.progress.step)

    def exit_status(self) -> int:
        """0 of a finished run; where a signal ended it 128 and its number, as a shell has it, once all ranks ask."""
        if self.stopped_by is None:
            return 0
        self.stop.ranks.largest(0)  # launchers end the other processes at the first that leaves with such a status
        return 128 + self.stopped_by


def message_timeout(hang_timeout: float) -> float:
    """Seconds that a message may be under way: more than a hang may last, so that the watch speaks first."""
    return 2 * hang_timeout + 60 if hang_timeout else NEVER
