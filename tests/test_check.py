"""`easyctx check`: its runs, what it refuses, and that it notices wrong attention and failing ranks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from easyctx.check.command import EXIT_OVER_TOLERANCE, EXIT_RANK_FAILED, check_and_report
from easyctx.check.settings import CheckSettings
from easyctx.cli import EXIT_ERROR, main

MODE = "zigzag_ring_attn"


@pytest.fixture
def tiny(tmp_path):
    """A config.json of a tiny Llama; `tiny(name=value)` changes it."""

    def write(**changes):
        values = {
            "model_type": "llama",
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values | changes))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model {} --parallel_mode zigzag --sp 2", "unknown parallel mode 'zigzag': choose one of"),
        ("--model {} --parallel_mode ulysses_attn --sp 3", "4 query and 2 key/value heads"),
        ("--model {} --parallel_mode zigzag_ring_attn --sp 1 --dp 4", "--sp is 1, but zigzag_ring_attn shares"),
        ("--model {} --parallel_mode data_parallel --sp 1", "compared with itself: --dp 2 or more"),
        ("--model {} --parallel_mode data_parallel --sp 2", "got 2"),
        ("--model {} --parallel_mode ring_attn --sp 4 --ring_degree 3", "a ring degree of 3"),
        ("--model {} --parallel_mode ring_attn --sp 4 --seq-length 9", "9 is too short for 4 ranks to a sequence: 16"),
        ("--model {} --parallel_mode ring_attn --sp 2 --dp 0", "--dp is 0"),
        ("--model {} --parallel_mode ring_attn --sp 2 --dtype float8", "'float8': choose one of float64, float32"),
        ("--model {} --parallel_mode ring_attn --sp 2 --attn-kernel cudnn", "runs on CUDA only, not on cpu"),
        ("--model {} --parallel_mode ring_attn --sp 2 --attn-kernel best", "unknown attention kernel 'best'"),
        ("--model {} --parallel_mode ring_attn --sp 2 --device cuda", "needs a GPU a rank, 2 for --sp 2 --dp 1, and 0"),
        ("--model {} --parallel_mode ring_attn --sp 40 --dp 2", "80 processes on this machine's CPU"),
        ("--model {} --parallel_mode ring_attn --sp 2 --json /no/such/x.json", "/no/such, which is no folder"),
        ("--model {} --parallel_mode data_parallel --sp 1 --dp 2 --packed", "--packed is for sequence-parallel modes"),
        ("--model lama --parallel_mode ring_attn --sp 2", "--model lama is no folder, no file, no family"),
        ("--model bert --parallel_mode ring_attn --sp 2", "'bert'"),
        ("--model tests --parallel_mode ring_attn --sp 2", "tests is a folder without config.json"),
        ("--model README.md --parallel_mode ring_attn --sp 2", "README.md cannot be read as JSON"),
    ],
)
def test_bad_inputs(tiny, monkeypatch, capsys, flags, message):
    def nothing(*_, **__):
        raise AssertionError("a process was about to be spawned")

    monkeypatch.setattr("easyctx.check.run.prepare_ranks", nothing)
    assert main(["check", *flags.format(tiny()).split()]) == EXIT_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lamma"}, "has model_type 'lamma', which this transformers does not know"),
        ({"num_attention_heads": "many"}, "is no valid llama configuration"),
    ],
)
def test_bad_configurations(tiny, capsys, changes, message):
    assert main(["check", "--model", tiny(**changes), "--parallel_mode", MODE, "--sp", "2"]) == EXIT_ERROR
    assert message in capsys.readouterr().err


def test_a_refusal_is_in_the_json(tiny, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--model", tiny(attention_dropout=0.1), "--parallel_mode", MODE, "--sp", "2", "--json", str(out)]
    assert main(["check", *flags]) == EXIT_ERROR
    found = json.loads(out.read_text())
    assert found["verdict"] == "refused"
    assert "attention_dropout is 0.1" in found["refused"][0]
    assert found["refused"][0] in capsys.readouterr().err


def test_a_run_holds(tiny, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--model", tiny(), "--parallel_mode", MODE, "--sp", "2", "--seq-length", "37", "--json", str(out)]
    assert main(["check", *flags]) == 0
    printed = capsys.readouterr()
    for expected in ("2 of 3 layers, 4 query and 2 key/value heads x 8", "2 x full causal", "EXACT within tolerance"):
        assert expected in printed.out
    assert "one process, float64" in printed.err
    found = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.json"]
    assert (found["verdict"], found["refused"], found["limit"]) == ("exact", [], 1e-10)
    assert found["worst_gradient_error"] < 1e-12
    assert len(found["losses"]) == 2
    assert {g["name"] for g in found["gradients"]} >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert found["attention_layers"][1]["mask"] == "full causal"
    assert found["kernels"]["torch_cpu"]["forward"] == found["kernels"]["torch_cpu"]["backward"] > 0
    assert found["settings"]["sp"] == 2
    assert "torch" in found["versions"]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("striped_attn", {"sp": 2, "packed": True}),
        ("ulysses_attn", {"sp": 2, "dp": 2, "dtype": "float32"}),
        (MODE, {"sp": 2, "dtype": "bfloat16"}),
        ("data_parallel", {"sp": 1, "dp": 2}),
    ],
)
def test_runs(tiny, capsys, mode, settings):
    config = tiny(model_type="mistral", sliding_window=11)
    settings = {"seq_length": 37, "steps": 1, **settings}
    assert check_and_report(CheckSettings(config, mode, **settings)) == 0, capsys.readouterr().out


def slightly_wrong():
    """Attention that gives a ten-millionth too much."""
    from easyctx.kernel import KERNELS

    right = KERNELS["torch_cpu"].forward

    def forward(*args):
        out, lse = right(*args)
        return out * (1 + 1e-7), lse

    KERNELS["torch_cpu"].forward = forward


def not_a_number():
    from easyctx.kernel import KERNELS

    right = KERNELS["torch_cpu"].backward
    KERNELS["torch_cpu"].backward = lambda *args: tuple(g * float("nan") for g in right(*args))


@pytest.mark.parametrize("fault", [slightly_wrong, not_a_number])
def test_wrong_attention_is_noticed(tiny, tmp_path, capsys, fault):
    out = tmp_path / "out.json"
    settings = CheckSettings(tiny(), MODE, sp=2, seq_length=37, json=str(out))
    assert check_and_report(settings, fault) == EXIT_OVER_TOLERANCE
    assert "NOT EXACT" in capsys.readouterr().out
    assert json.loads(out.read_text())["verdict"] == "not exact"


def is_rank_1():
    return os.environ["RANK"] == "1"


def dies():
    if is_rank_1():
        os.kill(os.getpid(), signal.SIGKILL)


def raises():
    if is_rank_1():
        raise RuntimeError("out of order")


def sleeps():
    if is_rank_1():
        time.sleep(600)


@pytest.mark.parametrize(
    ("fault", "timeout", "message"),
    [
        (dies, 60, "rank 1 of 2 died: exit code -9"),
        (raises, 60, "RuntimeError: out of order"),
        (sleeps, 4, "gave no sign of life for 4 s"),
    ],
)
def test_a_failing_rank_ends_the_check(tiny, capsys, fault, timeout, message):
    start = time.monotonic()
    settings = CheckSettings(tiny(), MODE, sp=2, seq_length=37, timeout=timeout)
    assert check_and_report(settings, fault) == EXIT_RANK_FAILED
    assert message in capsys.readouterr().err
    assert time.monotonic() - start < 30


def test_parsing_needs_no_torch():
    code = "import sys; from easyctx.cli import build_parser; build_parser('check').format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "easyctx.check.command" in loaded
    assert not {"torch", "transformers"} & set(loaded)
