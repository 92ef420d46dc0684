"""A `torch.profiler` trace of a few steps."""

from pathlib import Path
from typing import Any

import torch

from easyctx.training.config import TrainConfig, profiled_steps

FOLDER = "profile"


class StepProfiler:
    """Traces the steps of `--profile` on every rank, into OUTPUT_DIR/profile/rank_00000.json (chrome://tracing)."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self.steps = profiled_steps(config.profile) if config.profile else range(0)
        self.path = Path(config.output_dir) / FOLDER / f"rank_{rank:05d}.json"
        self._profiler: Any = None

    def before_step(self, step: int) -> None:
        """Call before optimizer step number `step`, from 1."""
        if self.steps and step == self.steps[0]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def after_step(self, step: int) -> None:
        if self._profiler is not None and step == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace if one is being taken, also of a run that ended in the midst of it."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        self._profiler = None
