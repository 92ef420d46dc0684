"""Checkpoints: a run that was stopped, killed or spread anew goes on as if nothing had been."""

import importlib.util
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from easyctx import train
from easyctx.training import checkpoint_checks, checkpoint_files
from easyctx.training.order import GlobalOrder
from easyctx.training.report import Reporter
from tests.forked_launch import forked_launch
from tests.resume_jobs import train_some
from tests.train_helpers import flags, make_inputs

STEPS = 7


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("resume"))


class Killed(BaseException):
    """Ends a run where it stands, as `kill -9` would: nothing is saved or tidied up."""


class Run:
    """Runs of the train loop in this process; `losses` by step, of all runs together."""

    def __init__(self, inputs: Path, output: Path, monkeypatch) -> None:
        self.inputs, self.output = inputs, output
        self.losses: dict[int, float] = {}
        self.at_step: dict[int, object] = {}  # what to do after a step
        original = Reporter.step

        def step(reporter: Reporter, loss: float, grad_norm: float, rate: float) -> None:
            original(reporter, loss, grad_norm, rate)
            self.losses[reporter.progress.step] = loss
            self.at_step.pop(reporter.progress.step, lambda: None)()

        monkeypatch.setattr(Reporter, "step", step)

    def __call__(self, **changes: object) -> int:
        settings = {"max_train_steps": STEPS, "gradient_accumulate_every": 2, "lr_schedule": "cosine", "save_every": 2}
        settings["sync_save"] = True  # what a thread writes would outlive a run that is killed in this process
        return train.main(flags(self.inputs, self.output, **settings | changes))

    def kill_after(self, step: int) -> None:
        def kill() -> None:
            raise Killed

        self.at_step[step] = kill

    @property
    def saved(self) -> list[str]:
        return sorted(p.name for p in (self.output / "checkpoints").iterdir())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model.safetensors")


@pytest.fixture
def run(inputs, tmp_path, monkeypatch) -> Run:
    return Run(inputs, tmp_path / "out", monkeypatch)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Run:
    """A run without interruption, and without a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        run = Run(inputs, tmp_path_factory.mktemp("whole") / "out", patch)
        assert run(save_every=0) == 0
    return run


def check_equal_weights(run: Run, whole: Run) -> None:
    """Bit for bit."""
    for name, tensor in run.weights.items():
        assert torch.equal(tensor, whole.weights[name]), name


def test_killed_runs_go_on_bit_for_bit(run, whole):
    for killed_after, begins_with in ((1, 1), (3, 1), (4, 3), (6, 3)):
        run.losses = {}
        run.kill_after(killed_after)
        with pytest.raises(Killed):
            run(resume=True)
        assert sorted(run.losses) == list(range(begins_with, killed_after + 1))
        assert run.losses == {step: whole.losses[step] for step in run.losses}
    assert run(resume=True) == 0
    assert run.losses == {step: whole.losses[step] for step in range(3, 8)}
    check_equal_weights(run, whole)
    assert run.saved == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_with_their_number(run, whole, capsys, number):
    run.at_step[3] = lambda: os.kill(os.getpid(), number)
    assert run(save_every=0, sync_save=None) == 128 + number
    assert run.saved == ["step_00000003"]
    assert not (run.output / "config.json").exists()
    assert f"stopped by {signal.Signals(number).name} after step 3 of 7" in capsys.readouterr().out
    assert run(save_every=0, resume=True) == 0
    assert run.losses == whole.losses
    check_equal_weights(run, whole)


def test_a_signal_in_the_last_step_lets_the_run_end_well(run, whole, capsys):
    """Ranks hear of a signal at different moments: after the last step there is no next one to agree upon."""
    run.at_step[STEPS] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert run(save_every=0) == 0
    assert "stopped by" not in capsys.readouterr().out
    check_equal_weights(run, whole)


def test_a_run_that_is_told_to_end_before_its_checkpoint_saves_that(run, capsys):
    """And does not end with 0 and without a model."""
    run.kill_after(5)
    with pytest.raises(Killed):
        run()
    assert run(resume=True, max_train_steps=3) == 0
    assert "goes on after step 4 of 3" in capsys.readouterr().out
    assert json.loads((run.output / "easyctx_run.json").read_text())["steps"] == 4


def test_other_batches_go_on_with_the_samples_that_were_not_seen():
    def rows(ranks: int, batch: int, start: int, number: int) -> list[int]:
        orders = [iter(GlobalOrder(5, 3, batch, rank, ranks, start)) for rank in range(ranks)]
        return [row for _ in range(number) for order in orders for row in next(order)]

    want = rows(1, 1, 0, 48)
    assert sorted(want[:5]) == sorted(want[5:10]) == list(range(5))
    assert want[:5] != want[5:10]
    assert rows(2, 3, 0, 4) + rows(4, 2, 24, 3) == want


def test_a_truncated_file_is_named_and_the_one_before_it_offered(run, inputs, capsys):
    run.kill_after(5)
    with pytest.raises(Killed):
        run()
    good, broken = (run.output / "checkpoints" / name for name in run.saved)
    file = next((broken / "state").glob("*.distcp"))
    size = file.stat().st_size
    os.truncate(file, size - 100)
    assert run(resume=True) == 2
    said = capsys.readouterr().err
    assert f"{broken} is damaged: state/{file.name} has {size - 100:,} bytes instead of {size:,}" in said
    assert f"--resume {good}" in said
    with file.open("ab") as end:
        end.write(bytes(100))
    assert run(resume=True) == 2
    assert "its CRC-32 is another" in capsys.readouterr().err
    (broken / "complete.json").unlink()
    assert run(resume=True) == 2
    assert "complete.json is missing" in capsys.readouterr().err
    assert run(resume=good) == 0
    assert "goes on after step 2" in capsys.readouterr().out
    assert "step_00000004.set_aside" in run.saved


def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(run, whole, capsys):
    """The limit on the size of a file stands for the disk's end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.at_step[3] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    run.at_step[5] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    try:
        assert run(sync_save=True, keep_checkpoints=9) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().out
    assert "step_00000004.partial could not be written (rank 0: " in said
    assert f"the last good checkpoint is {run.output}/checkpoints/step_00000002" in said
    assert run.saved == ["step_00000002", "step_00000006"]
    assert run.losses == whole.losses


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(run, capsys, monkeypatch):
    def read_only(path: Path, text: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint_files, "write_durably", read_only)
    monkeypatch.setattr(train, "load_model", None)
    assert run() == 2
    assert f"--output-dir {run.output} cannot be written to (Read-only file system: {run.output.parent})" in (
        capsys.readouterr().err
    )


def test_a_disk_without_room_is_refused_before_the_first_step(run, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run() == 1
    said = capsys.readouterr().err
    assert "has 0.0 GiB free on its disk, and the run needs" in said
    assert "3 checkpoints of 12 bytes a parameter" in said
    assert run.losses == {}


def test_what_a_run_cannot_go_on_with(run, inputs, tmp_path, capsys):
    run.kill_after(3)
    with pytest.raises(Killed):
        run()
    rows = load_from_disk(str(inputs / "data"))
    reordered = tmp_path / "reordered"
    rows.select(reversed(range(len(rows)))).save_to_disk(reordered)
    for changes, message in (
        (dict(seed=1), "--seed (1 now, 42 in its run)"),
        (dict(seq_length=99), "--seq-length (99 now, 101 in its run)"),
        (dict(rope_theta=2e5), "--rope-theta (200000.0 now, 100000.0 in its run)"),
        (dict(dataset=reordered), "the dataset's rows hold other tokens ("),
        (dict(overwrite=True), "--overwrite begins a run anew and --resume goes on"),
        (dict(resume=tmp_path), "holds another run"),
    ):
        assert run(**{"resume": True} | changes) == 2
        assert message in capsys.readouterr().err
    assert train.main(flags(inputs, tmp_path / "new", resume=tmp_path / "empty")) == 2
    assert "empty holds no checkpoint" in capsys.readouterr().err
    other = make_inputs(tmp_path, intermediate_size=64)
    assert train.main(flags(inputs, run.output, resume=True, model=other / "model")) == 2
    assert "layers.0.mlp.gate_proj.weight has the shape (48, 32), this one's (64, 32)" in capsys.readouterr().err
    assert run(resume=True, learning_rate=1e-3) == 0
    assert "--learning-rate 0.001 (was 0.01)" in capsys.readouterr().out


def test_a_checkpoint_starts_a_run_elsewhere(run, whole, inputs, tmp_path):
    """From another output folder, named or found, without changing it; and overwriting forgets the old run."""
    run.kill_after(5)
    with pytest.raises(Killed):
        run()
    source, before = run.output, run.saved
    for named, first in ((source, 5), (source / "checkpoints" / before[0], 3)):
        run.output, run.losses = tmp_path / f"from_{first}", {}
        assert run(resume=named) == 0
        assert run.losses == {step: whole.losses[step] for step in range(first, STEPS + 1)}
        check_equal_weights(run, whole)
    run.output = source
    assert run.saved == before
    assert run(overwrite=True, save_every=0) == 0
    assert not (source / "checkpoints").exists()
    assert run(resume=True, max_train_steps=STEPS + 1) == 2  # rather than train anew over the weights
    run.kill_after(1)
    with pytest.raises(Killed):
        run(overwrite=True, save_every=0)
    assert run(resume=True, save_every=0) == 2  # the finished run is gone, and the new one has not come far


def test_the_record_of_a_checkpoint(run):
    run.kill_after(3)
    with pytest.raises(Killed):
        run()
    folder = run.output / "checkpoints" / "step_00000002"
    trainer = json.loads((folder / "trainer.json").read_text())
    assert trainer["progress"]["step"] == 2
    assert trainer["progress"]["samples"] == 8
    assert trainer["config"]["save_every"] == 2
    recorded = {record["name"] for record in json.loads((folder / "complete.json").read_text())["files"]}
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert present - recorded == {"complete.json"}


@pytest.mark.parametrize("adapters", [False, True])
def test_one_checkpoint_serves_every_engine_and_number_of_ranks(ranks, tmp_path, adapters):
    """Weights, or adapters, and AdamW's moments go from one process through DDP, FSDP2 and HSDP, as if it were one
    run."""
    want, weights = train_some(0, 1, "alone", 0, 10, tmp_path / "whole", adapters)
    chain = [("alone", 1), ("ddp", 4), ("fsdp2", 2), ("hsdp", 4), ("alone", 1)]
    for index, (engine, world) in enumerate(chain):
        begin, end = 2 * index, 2 * index + 2
        job = (engine, begin, end, tmp_path / "parts", adapters)
        found = [train_some(0, 1, *job)] if world == 1 else ranks(world).run(train_some, *job)
        for losses, _ in found:
            assert losses == pytest.approx(want[begin:end], rel=1e-12), engine
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.launch
def test_zero3_goes_on_with_a_run_of_one_process_and_gives_it_back(run, whole, capsys):
    if importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None:
        pytest.skip("needs DeepSpeed and a C++ compiler: pip install 'easyctx[deepspeed]'")
    run.kill_after(3)
    with pytest.raises(Killed):
        run(lr_schedule="constant")
    # Three ranks, which divide few of the parameters, share each sequence to step 5, with a checkpoint after step 4.
    changes = dict(max_train_steps=5, gradient_accumulate_every=2, save_every=4, resume=True)
    mode = dict(parallel_mode="zigzag_ring_attn", lr_schedule="constant")
    engine = ["--num_processes", "3", "--mixed_precision", "no"]
    said = forked_launch("zero3_offload.yaml", flags(run.inputs, run.output, **changes, **mode), *engine)
    assert "DeepSpeed ZeRO-3, parameters and optimizer offloaded" in said
    assert "goes on after step 2 of 5 and 8 sequences" in said
    card = json.loads((run.output / "easyctx_run.json").read_text())
    assert run(resume=True, lr_schedule="constant") == 0
    assert sorted(run.losses) == [1, 2, 3, 5, 6, 7]
    want = constant_rate_losses(whole.inputs, run.output.with_name("constant"))
    assert card["last_step"]["loss"] == pytest.approx(want[5], rel=1e-4)
    assert run.losses == pytest.approx({step: want[step] for step in run.losses}, rel=1e-4)


def constant_rate_losses(inputs: Path, output: Path) -> dict[int, float]:
    with pytest.MonkeyPatch.context() as patch:
        run = Run(inputs, output, patch)
        assert run(save_every=0, lr_schedule="constant") == 0
    return run.losses
