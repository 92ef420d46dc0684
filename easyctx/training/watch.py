"""What looks on while a run goes from step to step: signals, headway, the profiler."""

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
    """Entered around a run's steps, by all ranks."""

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
        while self.progress.step < self.config.max_train_steps and not self.stop.agreed():
            self.profiler.before_step(self.progress.step + 1)
            yield self.progress.step
            self.profiler.after_step(self.progress.step)

    @property
    def stopped_by(self) -> str | None:
        """The name of the signal that ended the steps."""
        return self.stop.name if self.stop.received else None


def message_timeout(hang_timeout: float) -> float:
    """Seconds that a message may be under way: more than a hang may last, so that the watch speaks first."""
    return 2 * hang_timeout + 60 if hang_timeout else NEVER
