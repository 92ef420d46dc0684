"""`kill -9` at random moments loses the steps since the last checkpoint and nothing else."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.killed_runs import KilledRun
from tests.train_helpers import make_inputs

KILLS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("kill"))


def test_kills(inputs, tmp_path):
    """benchmarks/kill_resume.py does the same many times, and with several processes."""
    run = KilledRun(inputs, tmp_path / "out", steps=20, save_every=3, seconds=(0.0, 0.3))
    losses, weights = run.whole()
    dice = random.Random(1)
    while run.counts["kills"] < KILLS and not run.live(dice):
        pass
    assert run.counts["kills"], "every start came to its end before it was killed"
    assert run.live(None)
    assert run.losses == {step: {loss} for step, loss in losses.items()}
    found = load_file(run.output / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
