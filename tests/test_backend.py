"""Third-party backends: what is refused and when, and the way to a package, with stand-ins for the packages."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

import easyctx.functional as functional
from easyctx import apply_seq_parallel_monkey_patch, prepare_seq_parallel_inputs
from easyctx import backend as backends
from easyctx.backend import check_backend, check_backend_config, third_party_attention
from easyctx.documents import Documents
from easyctx.mesh import Mesh
from easyctx.train import main
from tests.models import tiny_config, tiny_model

VERSIONS = {"ring-flash-attn": "0.1.8", "yunchang": "0.6.4"}


def fake_packages(monkeypatch, calls=None):
    """The two packages, and flash-attn, as far as they are called; their attention is easyctx's own."""

    def library(mode):
        def attention(q, k, v, *, softmax_scale, causal, group):
            assert causal
            assert all(t.is_contiguous() for t in (q, k, v))
            if calls is not None:
                calls.append(mode)
            return functional.seq_parallel_attn_func(mode, q, k, v, softmax_scale=softmax_scale, group=group)

        return attention

    class Ulysses:
        def __init__(self, group):
            self.group = group

        def __call__(self, q, k, v, *, softmax_scale, causal, window_size, softcap):
            assert softcap == 0
            assert causal
            if calls is not None:
                calls.append("ulysses_attn")
            settings = dict(softmax_scale=softmax_scale, group=self.group, window_size=window_size)
            return functional.ulysses_attn_func(q, k, v, **settings)

    modules = {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {},
        "ring_flash_attn": {},
        "ring_flash_attn.ring_flash_attn": {"ring_flash_attn_func": library("ring_attn")},
        "ring_flash_attn.zigzag_ring_flash_attn": {"zigzag_ring_flash_attn_func": library("zigzag_ring_attn")},
        "ring_flash_attn.stripe_flash_attn": {"stripe_flash_attn_func": library("striped_attn")},
        "yunchang": {"UlyssesAttention": Ulysses},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "_installed", VERSIONS.get)
    backends._yunchang.cache_clear()


def test_what_is_missing_is_named(monkeypatch):
    def refusal(*settings):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            check_backend(*settings)
        return str(error.value)

    versions = {}
    monkeypatch.setattr(backends, "_installed", versions.get)
    assert "unknown attention backend 'nope': choose one of easyctx, ring_flash_attn" in refusal("nope", "ring_attn")
    assert "ring_flash_attn has no ulysses_attn, only ring_attn, zigzag" in refusal("ring_flash_attn", "ulysses_attn")
    assert "needs ring-flash-attn 0.1.8, which is not installed: install" in refusal("ring_flash_attn", "ring_attn")
    assert "kernel cudnn is one of easyctx's own, and backend yunchang" in refusal("yunchang", "usp_attn", "cudnn")
    versions["yunchang"] = "0.5"
    assert "needs yunchang 0.6.4, and 0.5 is installed" in refusal("yunchang", "usp_attn")
    versions["yunchang"] = "0.6.4"
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "needs flash_attn.flash_attn_interface, which does not import here" in refusal("yunchang", "usp_attn")
    fake_packages(monkeypatch)
    monkeypatch.setitem(sys.modules, "yunchang", None)
    assert "needs yunchang, which does not import here" in refusal("yunchang", "usp_attn")
    check_backend("ring_flash_attn", "striped_attn")
    check_backend("easyctx", "data_parallel", "cudnn")


def test_the_version_is_that_of_the_distribution():
    assert backends._installed("torch") == importlib.metadata.version("torch")
    assert backends._installed("no-such-distribution") is None


@pytest.mark.parametrize(
    ("name", "mode", "family", "changes", "message"),
    [
        ("ring_flash_attn", "zigzag_ring_attn", "mistral", {"sliding_window": 9}, "has no sliding window in zigzag"),
        ("ring_flash_attn", "ring_attn", "gemma2", {}, "no sliding window and no softcap in ring_attn"),
        ("yunchang", "ulysses_attn", "gpt_oss", {}, "has no sinks in ulysses_attn"),
        ("yunchang", "usp_attn", "phi3", {}, "has no sliding window in usp_attn"),
        ("ring_flash_attn", "striped_attn", "llama", {"head_dim": 12}, "multiples of 8 up to 256, not 12"),
        ("ring_flash_attn", "striped_attn", "llama", {"head_dim": 264}, "multiples of 8 up to 256, not 264"),
        ("yunchang", "ulysses_attn", "llama", {}, "2 of them do not go round 4"),
    ],
)
def test_models_that_a_backend_cannot_compute(name, mode, family, changes, message):
    config = tiny_config(family, **changes)
    with pytest.raises(ValueError, match=message):
        check_backend_config(name, mode, config, 4)
    check_backend_config("easyctx", mode, config, 4)


def test_models_that_it_can():
    for family in ("llama", "qwen3", "mistral"):
        windowless = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
        check_backend_config("ring_flash_attn", "ring_attn", tiny_config(family, **windowless), 4)
    check_backend_config("yunchang", "ulysses_attn", tiny_config("mistral", sliding_window=9), 2)


@pytest.mark.parametrize(
    ("mode", "dtype", "settings", "message"),
    [
        ("zigzag_ring_attn", torch.bfloat16, {"window": 4}, "no sliding window"),
        ("zigzag_ring_attn", torch.bfloat16, {"softcap": 3.0}, "no softcap"),
        ("zigzag_ring_attn", torch.bfloat16, {"sinks_H": torch.zeros(2)}, "no sinks"),
        ("zigzag_ring_attn", torch.bfloat16, {"documents": Documents(8, ((0, 3),))}, "no document borders"),
        ("ring_attn", torch.float16, {}, "no float16 in ring_attn"),
        ("zigzag_ring_attn", torch.float32, {}, "takes bfloat16 or float16, not torch.float32"),
    ],
)
def test_calls_that_a_backend_cannot_compute(mode, dtype, settings, message):
    q = torch.zeros(1, 8, 2, 8, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        third_party_attention("ring_flash_attn", mode, Mesh(), q, q, q, scale=1.0, **settings)


def patched_model(rank, world, name, mode, family):
    """A patched model's loss gradients through the package, and through easyctx's own."""
    calls, found = [], []
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_packages(monkeypatch, calls)
        for backend in (name, "easyctx"):
            model = tiny_model(family, torch.bfloat16)
            ids = torch.arange(3, 51).view(1, -1)
            local = prepare_seq_parallel_inputs(mode, ids, None, None, rank, world, "cpu")
            with apply_seq_parallel_monkey_patch(mode, model, backend=backend):
                logits = model(local["local_input_ids"], position_ids=local["local_position_ids"]).logits
                logits.float().square().sum().backward()
            found.append([p.grad for p in model.parameters()])
            expected = model.config.num_hidden_layers if backend == name else 0
            assert calls == [mode] * expected, (backend, calls)
            calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(bool(g.any()) for g in found[0])


@pytest.mark.parametrize(
    ("name", "mode", "family"),
    [
        ("ring_flash_attn", "zigzag_ring_attn", "llama"),
        ("ring_flash_attn", "striped_attn", "llama"),
        ("yunchang", "ulysses_attn", "phi3"),  # with a sliding window
    ],
)
def test_a_patched_model_calls_the_package(ranks, name, mode, family):
    ranks(2).run(patched_model, name, mode, family)


def test_refused_before_a_model_is_looked_for(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--model", "owner/no-such-model", "--dataset", "x", "--output-dir", str(tmp_path / "out")]
    assert main([*flags, "--parallel_mode", "zigzag_ring_attn", "--attn-backend", "yunchang"]) == 2
    assert "error: attention backend yunchang has no zigzag_ring_attn" in capsys.readouterr().err
    assert main([*flags, "--parallel_mode", "zigzag_ring_attn", "--attn-backend", "ring_flash_attn"]) == 2
    assert "needs ring-flash-attn 0.1.8, which is not installed" in capsys.readouterr().err
    fake_packages(monkeypatch)
    mode = ["--parallel_mode", "ring_attn", "--attn-backend", "ring_flash_attn"]
    assert main([*flags, *mode, "--recompute", "keep-attention"]) == 2
    assert (
        "--recompute keep-attention keeps what easyctx's own attention makes, and --attn-backend is ring_flash_attn"
        in capsys.readouterr().err
    )


def test_patch_refuses_what_a_backend_lacks(monkeypatch):
    fake_packages(monkeypatch)
    with pytest.raises(ValueError, match="ring_flash_attn has no sliding window"):
        apply_seq_parallel_monkey_patch("ring_attn", tiny_model("phi3"), backend="ring_flash_attn")
    with pytest.raises(ValueError, match="yunchang has no ring_attn"):
        apply_seq_parallel_monkey_patch("ring_attn", "llama", backend="yunchang")
