"""benchmarks/train_step.py: its methods take the same step, a method that fails brings no other down, the chart."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from easyctx.memory.budget import GIB, MemoryShape, Setting, predict
from easyctx.memory.policy import Budget, Wishes, decide
from easyctx.training.memory import RunMemory
from tests.engine_jobs import fresh_accelerator
from tests.test_attention_benchmark import forget_flash_attn
from tests.test_backend import fake_packages

ROOT = Path(__file__).parent.parent
FOLDER = str(ROOT / "benchmarks")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def settings(*flags: str) -> tuple[Namespace, list[str]]:
    from train_step import parse_arguments

    return parse_arguments(["--model", "tiny", "--layers", "2", "--seq-lengths", "96", *flags])


def steps_of(rank: int, world: int, names: list[str], *flags: str) -> list[dict]:
    """A row of each method, or why there is none; the packages that are called are tests' own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(FOLDER)
        forget_flash_attn(monkeypatch)
        fake_packages(monkeypatch)
        if world > 1:
            monkeypatch.setenv("WORLD_SIZE", str(world))
        from step_parts import method as step_method
        from step_parts.run import make_method, measure

        monkeypatch.setattr(step_method, "make_accelerator", fresh_accelerator)
        rows = []
        for name in names:
            try:
                method = make_method(name, *settings(*flags))
                rows.append({"method": method.label} | measure(method, 96, 2))
            except ValueError as error:
                rows.append({"method": name, "error_message": str(error)})
        return rows


def test_all_take_the_same_step_on_two_ranks(ranks):
    names = ["easyctx", "easycontext", "easycontext_offload", "context_parallel"]
    flags = ["--dtype", "bfloat16", "--parallel_mode", "striped_attn", "--loss", "full"]
    own, recipe, offloaded, context_parallel = ranks(2).run(steps_of, names, *flags)[0]
    assert own["method"] == "easyctx striped_attn"
    assert "recompute" in own
    assert "CUDA only, not cpu" in context_parallel["error_message"]
    assert recipe["kernel"] == "ring-flash-attn over flash-attn 2"
    assert (recipe["recompute"], offloaded["recompute"]) == ("all", "all, inputs on the host")
    for row in (recipe, offloaded):
        assert row["loss"] == pytest.approx(own["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-2)
        assert row["tokens_per_s"] == pytest.approx(96 / row["seconds"])
        assert row["seconds"] == min(row["seconds_of_steps"])
        assert row["engine"] == "DDP"
    assert recipe["loss"] == offloaded["loss"]  # what is kept where changes nothing
    assert own["loss"] == pytest.approx(torch.tensor(512.0).log().item(), rel=0.02)  # of random weights


def test_one_process_has_the_attention_alone():
    own, context_parallel, recipe = steps_of(0, 1, ["easyctx", "context_parallel", "easycontext"])
    assert own["method"] == "easyctx data_parallel"
    assert context_parallel["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert context_parallel["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-4)
    assert "runs on CUDA only" in recipe["error_message"]


def test_easyctx_flags_are_its_own():
    from step_parts.settings import shared_flags

    flags = [
        "--mlp-tile",
        "32",
        "--dtype",
        "bfloat16",
        "--memory",
        "off",
        "--seed",
        "7",
        "--parallel_mode",
        "ring_attn",
    ]
    assert shared_flags(flags) == ["--dtype", "bfloat16", "--seed", "7"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps are counts: give 1 or more"),
        (["--seq-lengths", "-5"], "are counts"),
        (["--methods", "easycontext", "nobody"], "invalid choice: 'nobody'"),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
        (["--layers-timed", "0"], "--layers-timed is 0"),
        (["--layers-timed", "2", "--methods", "easyctx", "alst"], "(alst) plan nothing: add --methods easyctx, or"),
    ],
)
def test_bad_flags_end_before_anything_starts(monkeypatch, capsys, flags, message):
    import train_step

    monkeypatch.setattr(train_step, "run_all", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags])
    with pytest.raises(SystemExit) as ended:
        train_step.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


SPILL = ("--mlp-tile", "64", "--keep-inputs", "host", "--keep-attention", "host", "--checkpoint-every", "2")


def test_some_layers_run_with_the_memory_of_all():
    """The last two of four, since the third keeps the input of both."""
    timed = ("--layers", "4", "--layers-timed", "1", "--methods", "easyctx")
    [row] = steps_of(0, 1, ["easyctx"], *timed, *SPILL)
    assert (row["layers_timed"], row["layers_accounted"]) == (2, 2)
    assert 0 < row["seconds_timed"] < row["seconds"]
    assert row["seconds_timed"] == min(row["seconds_of_steps"])
    assert row["tokens_per_s"] == pytest.approx(96 / row["seconds"])
    attention, inputs = 96 * (4 * 64 + 4 * 4), 96 * 4 * 64
    assert row["ballast_host_gib"] * GIB == 2 * attention + inputs
    [two] = steps_of(0, 1, ["easyctx"], "--layers", "2", *SPILL)
    assert (row["loss"], row["grad_norm"]) == (two["loss"], two["grad_norm"])  # the layers that ran
    assert row["predicted_gpu_gib"] == pytest.approx(two["predicted_gpu_gib"] + row["ballast_gpu_gib"])
    [refused] = steps_of(0, 1, ["easyctx"], *timed)
    assert "--layers-timed 1: layers that do not run hold what is planned" in refused["error_message"]


@pytest.mark.parametrize("pins", [True, False])
def test_what_stands_in_for_an_offloaded_models_layers(pins):
    """Llama-3-8B's shape at 524,288 tokens on one GPU: with what runs it comes to what is predicted of the whole."""
    from step_parts.layers_timed import check_room, last_layers, layers_to_run, sizes_of_ballast
    from step_parts.models import model_config

    whole = offloaded(524_288, host=200 if pins else 128)
    assert whole.decision.pins == pins
    layers = layers_to_run([whole.decision], 3)
    assert whole.decision.choices.layers[32 - layers].inputs != "recompute"
    part = last_layers(whole, model_config("llama-3-8b", layers, 524_288))
    sizes, of_part = sizes_of_ballast(whole, part), predict(part.shape, part.setting, part.decision.choices)
    predicted = whole.decision.predicted
    assert sizes.gpu + of_part.gpu_peak == predicted.gpu_peak
    assert sizes.pinned + sizes.unpinned + of_part.host_peak == predicted.host_peak
    left_out = (whole.shape.parameters - part.shape.parameters) * 4
    assert sizes.unpinned == left_out * (2 if pins else 4)
    with pytest.raises(ValueError, match=r"and this machine has 100.0 left: give --host-memory 100 or"):
        check_room(whole, 100 * GIB)


def test_a_gpu_without_rates_is_refused_before_anything_is_built(monkeypatch):
    from step_parts import layers_timed
    from step_parts.own import Own

    def no_rates(name):
        raise ValueError(f"no rates are known for GPU {name!r}")

    monkeypatch.setattr(layers_timed, "find_device", no_rates)
    monkeypatch.setattr(Own, "make_model", lambda *_: pytest.fail("it was built"))
    [row] = steps_of(0, 1, ["easyctx"], "--layers", "4", "--layers-timed", "1", "--methods", "easyctx", *SPILL)
    assert row["error_message"].startswith("--layers-timed predicts the time of all layers, and no rates are known")


def test_the_whole_is_predicted_with_the_optimizer_of_the_run():
    """Muon orthogonalises the layers' matrices, and AdamW steps the embeddings: it takes the layers longer."""
    from step_parts.layers_timed import as_whole, last_layers
    from step_parts.models import model_config

    whole = offloaded(4096, host=400)
    seconds = []
    for optimizer in ("adamw", "muon"):
        run = replace(whole, setting=replace(whole.setting, engine="ddp", optimizer=optimizer))
        part = last_layers(run, model_config("llama-3-8b", 2, 4096))
        seconds.append(as_whole({"seconds": 1.0}, run, part, 4096, "data_parallel")["seconds"])
    assert seconds[0] < seconds[1]


def offloaded(length: int, host: int) -> RunMemory:
    from step_parts.models import model_config

    shape = MemoryShape.from_config(model_config("llama-3-8b", None, length))
    setting, budget = Setting(length, "fsdp2_offload"), Budget(134 * GIB, host * GIB)
    decision = decide(shape, setting, budget, Wishes(), length)
    return RunMemory(shape, replace(setting, pins=decision.pins), budget, decision, True)


def test_rows_that_disagree_say_so():
    from step_parts.rows import compared

    def row(method, loss, norm, length=96):
        return {"method": method, "asked": method, "seq_length": length, "loss": loss, "grad_norm": norm}

    failed = {"method": "e", "asked": "e", "seq_length": 96, "error_message": "no"}
    rows = [row("a", 6.0, 1.0), row("b", 6.01, 1.01), failed, row("c", 6.02, 1.0), row("d", 6.0, float("nan"))]
    found = compared([*rows, row("c", 9.0, 9.0, 192)])
    assert [found[i].get("disagrees") for i in (0, 1, 2, 5)] == [None] * 4
    assert found[3]["disagrees"] == "loss 6.02, that of a is 6"
    assert found[4]["disagrees"] == "grad_norm nan, that of a is 1"
    assert all("asked" not in each for each in found)


def test_what_a_failed_method_did_not_run_is_named():
    from step_parts.rows import failed_rows

    args, _ = settings("--seq-lengths", "512", "128", "256")
    done = [{"asked": "alst", "seq_length": 128}, {"asked": "easyctx", "seq_length": 512}]
    rows = failed_rows(args, "alst", done, {"seq_length": 256, "message": "OutOfMemoryError: 3 GiB"})
    assert [(row["seq_length"], row["error_message"]) for row in rows] == [
        (256, "OutOfMemoryError: 3 GiB"),
        (512, "not run, since 256 tokens failed: OutOfMemoryError: 3 GiB"),
    ]


FAILS = (
    "import json, sys; json.dump({'seq_length': 5, 'message': 'out of memory'}, open(sys.argv[1], 'w')); sys.exit(1)"
)
SLEEPS = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("", 30, None),
        (FAILS, 30, "out of memory"),
        ("import os; os.kill(os.getpid(), 9)", 30, "killed by signal 9 (out of host memory?)"),
        ("raise SystemExit(3)", 30, "exit status 3"),
        (SLEEPS, 0.3, "not done after 0.3 s"),
    ],
)
def test_how_a_child_ended(tmp_path, monkeypatch, code, timeout, message):
    from step_parts import child as step_child

    monkeypatch.setattr(step_child, "GRACE", 0.2)
    command = [sys.executable, "-S", "-c", code, str(tmp_path / step_child.FAILURE)]
    failure = step_child.Ranks().run("method", command, tmp_path, timeout)
    assert failure is None if message is None else message in failure["message"]


def test_one_ranks_failure_ends_the_others(tmp_path, monkeypatch):
    """Rank 1 runs out of memory, and rank 0 would wait for it for ever; the next method starts afresh."""
    from step_parts import child as step_child

    monkeypatch.setattr(step_child, "GRACE", 0.2)
    parents = [step_child.Ranks() for _ in range(2)]
    found: dict[tuple[str, int], dict | None] = {}
    for rank, parent in enumerate(parents):
        parent.rank, parent.size, parent.store = rank, 2, parents[0].store
        (tmp_path / str(rank)).mkdir()

    def run(rank):
        for name, code in (("first", FAILS if rank else SLEEPS), ("second", "")):
            folder = tmp_path / str(rank)
            command = [sys.executable, "-S", "-c", code, str(folder / step_child.FAILURE)]
            found[name, rank] = parents[rank].run(name, command, folder, 30)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    failure = {"seq_length": 5, "message": "out of memory"}
    assert found == {("first", 0): failure, ("first", 1): failure, ("second", 0): None, ("second", 1): None}


def test_the_chart_is_drawn(tmp_path):
    from step_parts.chart import draw

    def row(method, length, rate, peak):
        figures = {"tokens_per_s": rate, "peak_gpu_gib": peak}
        return {"method": method, "model": "tiny", "layers": 2, "gpus": 2, "seq_length": length} | figures

    rows = [row("easyctx zigzag_ring_attn", 96, 9.0, 3.0), row("easyctx zigzag_ring_attn", 192, 5.0, 4.0)]
    rows += [row("alst", 96, 7.0, 5.0), {"method": "alst", "seq_length": 192, "error_message": "out of memory"}]
    assert draw(rows, tmp_path / "chart.png") == tmp_path / "chart.png"
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
    assert draw(rows[-1:], tmp_path / "none.png") is None


@pytest.mark.launch
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_on_two_ranks(tmp_path):
    """ALST under ZeRO-3, launched, takes the step that one process takes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs/cpu.yaml"), "--main_process_port", "0"]
    command += [f"{FOLDER}/train_step.py", "--model", "tiny", "--layers", "2", "--seq-lengths", "96"]
    command += ["--methods", "alst", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = tmp_path.glob("train_step_*.json")
    found = json.loads(path.read_text())
    assert "--child" not in found["command"]
    [alst], [own] = found["rows"], steps_of(0, 1, ["easyctx"])
    assert "error_message" not in alst, alst
    assert (alst["method"], alst["gpus"], alst["seq_length"]) == ("alst", 2, 96)
    assert alst["loss"] == pytest.approx(own["loss"], rel=1e-5)
    assert alst["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-3)
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, "python"),
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
            "accelerate launch --config_file … --num_processes 2",
        ),
    ],
)
def test_result_files_name_what_launched_them(monkeypatch, variables, launcher):
    from shared_parts.results_file import this_command

    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["benchmarks/attention.py", "--masks", "causal"])
    assert this_command() == f"{launcher} benchmarks/attention.py --masks causal"
