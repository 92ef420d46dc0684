"""`easyctx check`: what it shrinks, what it finds, what it refuses, and that it notices wrong attention."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig

from easyctx.check.batches import make_batch
from easyctx.check.command import EXIT_OVER_TOLERANCE, EXIT_RANK_FAILED, check_and_report
from easyctx.check.compare import WHOLE, compare, compare_half
from easyctx.check.float64 import float64_throughout
from easyctx.check.model import make_model
from easyctx.check.probe import probe, stock_attention
from easyctx.check.settings import CheckSettings
from easyctx.check.shrink import kept_layers, shrink
from easyctx.check.steps import Trace
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


def small(family, **settings):
    config = AutoConfig.for_model(family)
    return config, shrink(config, **({"num_layers": 2, "seq_length": None, "sp": 4} | settings))


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3_moe", "gemma2", "phi3", "gpt_oss"])
def test_shrinking_keeps_what_attention_depends_on(family):
    config, found = small(family)
    kept = found.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (kept.num_attention_heads, kept.head_dim) == (config.num_attention_heads, head_dim)
    assert kept.num_key_value_heads == config.num_key_value_heads
    assert kept.rope_parameters == config.rope_parameters
    assert kept.num_hidden_layers == len(found.layers) == 2
    assert kept.hidden_size < config.hidden_size == AutoConfig.for_model(family).hidden_size
    assert set(getattr(kept, "layer_types", None) or ()) == set(getattr(config, "layer_types", None) or ())
    if top_k := getattr(kept, "num_experts_per_tok", None):
        assert top_k == config.num_experts_per_tok < kept.num_local_experts < config.num_local_experts
        assert small(family, all_experts=True)[1].config.num_local_experts == top_k


def test_every_kind_of_layer_is_kept():
    config, found = small("gemma3_text", num_layers=1)
    assert found.layers == [0, 5]
    assert found.config.layer_types == ["sliding_attention", "full_attention"]
    assert "2 layers instead of 1" in found.notes[0]
    assert kept_layers(AutoConfig.for_model("smollm3"), 3) == [0, 1, 3]  # the first without RoPE
    config = AutoConfig.for_model("qwen3_moe", mlp_only_layers=[3])
    found = shrink(config, num_layers=3, seq_length=50, sp=2)
    assert (found.layers, found.config.mlp_only_layers) == ([0, 1, 3], [2])


def test_windows_matter():
    _, real = small("gpt_oss")
    assert real.config.sliding_window == 128 < real.seq_length == 193
    _, short = small("gpt_oss", seq_length=100)
    assert short.config.sliding_window == 33
    assert "128 -> 33" in short.notes[-1]
    _, long = small("mistral", seq_length=4099)
    assert long.config.sliding_window == 4096
    for sp in (2, 4, 7):
        length = small("mistral", sp=sp)[1].seq_length
        assert all(length % divisor for divisor in range(2, length))
    assert small("gpt_oss", packed=True)[1].seq_length > 3 * 128


def test_rope_that_looks_at_the_length_sees_a_long_one():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = AutoConfig.for_model("llama", rope_parameters=rope)
    assert shrink(config, num_layers=1, seq_length=100, sp=2).config.max_position_embeddings == 90
    packed = shrink(config, num_layers=1, seq_length=100, sp=2, packed=True)
    assert packed.config.max_position_embeddings == config.max_position_embeddings
    assert "stays below" in packed.notes[-1]


@pytest.mark.parametrize(
    ("family", "masks", "attention"),
    [
        ("llama", ["full causal", "full causal"], "sdpa"),
        ("gemma2", ["sliding window 33, logit softcap 50", "full causal, logit softcap 50"], "eager"),
        ("gpt_oss", ["sliding window 128, with sinks", "full causal, with sinks"], "eager"),
        ("smollm3", ["full causal", "full causal, no RoPE"], "sdpa"),
    ],
)
def test_probe(family, masks, attention):
    config, found = small(family)
    model = make_model(found.config, dtype=torch.float32, seed=0, device="cpu")
    layers = probe(model)
    assert [layer.mask for layer in layers] == masks
    assert layers[0].q_heads == config.num_attention_heads
    assert stock_attention(model, layers) == attention


def test_weights_do_not_depend_on_the_dtype():
    config = small("gpt_oss")[1].config
    double, half, rounded = (
        dict(make_model(config, dtype=dtype, seed=3, device="cpu", rounded_to=to).named_parameters())
        for dtype, to in ((torch.float64, None), (torch.bfloat16, None), (torch.float64, torch.bfloat16))
    )
    for name, values in double.items():
        assert torch.equal(values.to(torch.bfloat16), half[name]), name
        assert torch.equal(rounded[name], half[name].double()), name
    assert double["model.layers.0.self_attn.sinks"].std() > 0.5


def test_keep_double():
    x = torch.randn(5, 7, dtype=torch.float64)
    with float64_throughout():
        assert x.float() is x
        assert x.to(torch.float32).dtype == x.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert torch.arange(3).float().dtype == torch.float32
    assert x.float().dtype == torch.float32


def test_batches():
    batch, again = (make_batch(5, seed=1, length=97, vocabulary=50, packed=True) for _ in range(2))
    assert torch.equal(batch.input_ids, again.input_ids)
    assert torch.equal(batch.document_ids, again.document_ids)
    hidden = batch.labels == -100
    assert hidden[-1, :48].all()
    assert 0.1 < hidden[0].double().mean() < 0.5
    for row in range(2):
        lengths = [t.stop - t.start for r, t in batch.documents() if r == row]
        assert len(lengths) == 4
        assert sum(lengths) == 97
        assert max(lengths) >= 48


def trace(*gradients):
    return Trace([1.0] * len(gradients), [{"a": torch.tensor(g), "b": torch.ones(4)} for g in gradients])


def test_comparison_takes_the_worst_step_and_no_nan():
    right, wrong, broken = trace([1.0, 0], [1.0, 0]), trace([1.0, 0], [1.0, 0.5]), trace([1.0, 0], [1.0, float("nan")])
    found = compare(wrong, right, 1e-3)
    assert not found.holds
    assert (found.gradients[0].name, found.gradients[0].step, found.gradients[0].error) == ("a", 2, 0.5)
    assert found.whole.name == WHOLE
    assert compare(right, right, 1e-10).holds
    assert not compare(broken, right, 1e9).holds


def test_half_precision_is_measured_by_one_device():
    exact, one = trace([1.0, 0.0]), trace([1.0, 0.010])
    assert compare_half(trace([1.0, -0.012]), one, exact, 1.25, 0.01).holds
    assert not compare_half(trace([1.0, -0.020]), one, exact, 1.25, 0.01).holds


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
