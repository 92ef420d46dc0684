"""`--liger`: refused before a model is loaded where it cannot be; on a GPU the same loss and gradients."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch

from easyctx import liger
from easyctx.evals.models import load_config, load_model
from easyctx.evals.session import Session
from easyctx.mesh import Mesh
from tests.models import VOCAB, tiny_config, tiny_model


class Config:
    model_type = "llama"


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "easyctx\[liger\]"'):
        liger.check_liger(Config)


def test_missing_gpu_and_unknown_models_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="GPUs only"):
        liger.check_liger(Config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "_functions", lambda: {"qwen3": None, "mistral": None})
    with pytest.raises(ValueError, match="nothing for llama models, only for mistral, qwen3"):
        liger.check_liger(Config)


def test_a_mixture_with_dense_layers_is_refused(monkeypatch):
    """Liger looks for experts in every layer of such a model, and would fail with the weights loaded."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "_functions", lambda: {"qwen3_moe": None})
    liger.check_liger(tiny_config("qwen3_moe", mlp_only_layers=[]))
    with pytest.raises(ValueError, match=r"dense MLP .layers 1.: leave --liger out"):
        liger.check_liger(tiny_config("qwen3_moe", mlp_only_layers=[1]))


def test_only_what_lies_between_matrices_is_replaced(monkeypatch):
    """Its losses would take the place of ours; arguments that a family's function lacks are left out."""
    seen = {}

    def apply_to_llama(rope=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        seen.update(rope=rope, rms_norm=rms_norm, losses=(cross_entropy, fused_linear_cross_entropy), model=model)

    package = types.ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", package)
    model = types.SimpleNamespace(config=Config)
    liger.use_liger_kernels(model)
    assert seen == {"rope": True, "rms_norm": True, "losses": (False, False), "model": model}


def test_evals_refuse_it_before_weights_are_loaded_and_replace_kernels_after(monkeypatch, tmp_path):
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    plain = Session("data_parallel", Mesh(), torch.device("cpu"), torch.float32)
    session = dataclasses.replace(plain, liger=True)
    assert (plain.precision, session.precision) == ("float32", "float32, Liger's kernels")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--liger needs the package"):
        load_config(session, str(tmp_path))
    config = load_config(plain, str(tmp_path))
    replaced = []
    monkeypatch.setattr(liger, "use_liger_kernels", replaced.append)
    load_model(plain, str(tmp_path), config)
    assert replaced == []
    assert replaced == [load_model(session, str(tmp_path), config)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None, reason="needs a GPU and Liger"
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradients_on_a_gpu(family):
    ids = torch.randint(3, VOCAB, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for replaced in (False, True):
        model = tiny_model(family, torch.float32).cuda()
        if replaced:
            liger.use_liger_kernels(model)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in found[0].items():
        assert (found[1][name] - want).norm() < 1e-4 * want.norm(), name
