"""The life of an adapter: trained, stopped, gone on with, saved, merged, evaluated; and what is refused."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from accelerate import DistributedType
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from easyctx import cli, train
from easyctx.adapters import settings as adapter_settings
from easyctx.adapters.folder import load_frozen
from easyctx.adapters.inject import put_lora
from easyctx.adapters.merge import add_to_weights
from easyctx.adapters.settings import AdapterSettings, check_adapter_engine
from easyctx.environment import hardware
from easyctx.evals.models import check_models, load_config, load_model, load_tokenizer
from easyctx.evals.session import Session
from easyctx.mesh import Mesh
from tests.forked_launch import forked_launch
from tests.models import VOCAB, tiny_config
from tests.train_helpers import flags, make_inputs

RANK = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Iterator[Path]:
    # bitsandbytes compiles what it computes on a CPU, which takes half a minute.
    with torch._dynamo.config.patch(disable=True):
        yield make_inputs(tmp_path_factory.mktemp("adapters"))


def run(inputs: Path, output: Path, **changes: object) -> int:
    """A run with adapters; a list gives a flag several values."""
    arguments = flags(inputs, output, **{"lora_r": RANK, "gradient_accumulate_every": 1} | changes)
    words = {str(value): [str(each) for each in value] for value in changes.values() if isinstance(value, list)}
    return train.main([part for word in arguments for part in words.get(word, [word])])


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder: Path) -> torch.nn.Module:
    return load_frozen(str(folder), AutoConfig.from_pretrained(folder), torch.float32, CPU)


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "adapter"
    assert run(inputs, output, lora_train=["embeddings", "norms"], lora_alpha=6) == 0
    return output


def test_peft_loads_the_folder_and_computes_the_same(inputs, trained):
    config = AutoConfig.from_pretrained(trained)
    assert config.rope_parameters["rope_theta"] == 1e5
    base = AutoModelForCausalLM.from_pretrained(inputs / "model", config=config)
    untrained = logits_of(base)
    peft = logits_of(PeftModel.from_pretrained(base, trained))
    assert (peft - untrained).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(load(trained)), peft, rtol=1e-4, atol=1e-4)
    card = (trained / "README.md").read_text()
    assert "library_name: peft" in card
    assert "config=AutoConfig.from_pretrained(FOLDER)" in card
    named = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == (inputs / "model").resolve()


def test_merged_weights_equal_the_adapter(inputs, trained, tmp_path, capsys):
    output = tmp_path / "merged"
    assert cli.main(["merge", str(trained), "--output", str(output)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.config.rope_parameters["rope_theta"] == 1e5
    torch.testing.assert_close(logits_of(merged), logits_of(load(trained)), rtol=1e-4, atol=1e-4)
    stock = load_file(inputs / "model" / "model.safetensors")
    assert load_file(output / "model.safetensors").keys() == stock.keys()
    assert (output / "tokenizer.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    capsys.readouterr()
    assert cli.main(["merge", str(trained), "--output", str(output)]) == 2
    assert "holds something already: name a new folder" in capsys.readouterr().err
    assert cli.main(["merge", str(output), "--output", str(tmp_path / "again")]) == 2
    assert "is no adapter" in capsys.readouterr().err


def test_an_adapter_of_a_tied_head_is_not_merged():
    """It would change the embedding with the head."""
    config = tiny_config("llama")
    for is_tied in (False, True):
        config.tie_word_embeddings = is_tied
        model = AutoModelForCausalLM.from_config(config)
        put_lora(model, LoraConfig(r=2, target_modules=["lm_head"]), seed=0)
        if not is_tied:
            add_to_weights(model)
            continue
        with pytest.raises(ValueError, match="the adapter changes lm_head alone.*one weight"):
            add_to_weights(model)


def test_evals_take_the_folder(trained, tmp_path):
    """As an eval's session loads a model: with its base in 4 bits, too."""
    session = Session("data_parallel", Mesh(), CPU, torch.float32)
    assert check_models([str(trained)]) == ["adapter"]
    config = load_config(session, str(trained))
    assert config.rope_parameters["rope_theta"] == 1e5
    assert load_tokenizer(str(trained))("a")["input_ids"]
    adapter = logits_of(load_model(session, str(trained), config))
    torch.testing.assert_close(adapter, logits_of(load(trained)), rtol=1e-4, atol=1e-4)
    in_4_bits = load_model(replace(session, quantize="nf4"), str(trained), config)
    assert type(in_4_bits.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    difference = (logits_of(in_4_bits) - adapter).norm() / adapter.norm()
    assert 1e-3 < difference < 0.5
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="an adapter of the kind IA3, and only plain LoRA ones"):
        check_models([str(tmp_path)])


def test_only_what_is_trained_is_written(trained):
    tensors = load_file(trained / "adapter_model.safetensors")
    assert {"A", "B"} == {name.split("lora_")[1][0] for name in tensors if "lora_" in name}
    whole = [name for name in tensors if "lora_" not in name]
    assert len(whole) == 1 + 2 * 2 + 1, "the embedding, two norms to a layer, the last norm"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"quantize": "nf4", "optimizer": "adamw_8bit"}], ids=["lora", "4-bit"])
def test_a_run_goes_on_bit_for_bit(inputs, tmp_path, changes):
    """Its checkpoints hold the adapters alone. 8-bit state, whose matrices must be large enough to have it."""
    changes = changes | {"lora_r": 96}
    assert run(inputs, tmp_path / "whole", **changes) == 0
    assert run(inputs, tmp_path / "parts", save_every=2, sync_save=True, **changes) == 0
    parts = tmp_path / "parts"
    for name in ("config.json", "easyctx_run.json", "adapter_model.safetensors"):
        (parts / name).unlink()  # as if it had been killed after step 2
    assert run(inputs, parts, resume=True, **changes) == 0
    whole, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", parts))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    state = sum(p.stat().st_size for p in (parts / "checkpoints" / "step_00000002" / "state").glob("*.distcp"))
    adapters = sum(tensor.numel() for tensor in whole.values())
    assert state < adapters * 14 + 200_000


def test_other_adapters_are_refused(inputs, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(inputs, output, save_every=2, sync_save=True) == 0
    (output / "easyctx_run.json").unlink()

    def error(**changes: object) -> str:
        assert run(inputs, output, resume=True, **changes) == 2
        return capsys.readouterr().err

    assert f"--lora-r (8 now, {RANK} in its run)" in error(lora_r=8)
    assert "--lora-alpha (3.0 now, None in its run)" in error(lora_alpha=3)
    assert "--quantize (nf4 now, None in its run)" in error(quantize="nf4")
    assert "--optimizer (paged_adamw now, adamw in its run)" in error(optimizer="paged_adamw")
    assert f"--lora-r (0 now, {RANK} in its run)" in error(lora_r=0)


def test_an_adapter_is_trained_on(inputs, trained, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(inputs, output, model=trained, lora_r=None, rope_theta=None, learning_rate=1e-9) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained, output))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert AutoConfig.from_pretrained(output).rope_parameters["rope_theta"] == 1e5
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, 6)
    assert Path(settings["base_model_name_or_path"]) == (inputs / "model").resolve()
    stages = json.loads((output / "easyctx_run.json").read_text())["stages"]
    assert [stage["hardware"] for stage in stages] == [hardware()] * 2
    assert run(inputs, tmp_path / "other", model=trained, lora_r=8) == 2
    assert f"--lora-r is 8, and the adapter {trained}" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["/nowhere/base", "output/base", "the adapter itself"])
def test_a_base_that_is_gone_is_named(inputs, trained, tmp_path, base, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    base = str(adapter) if base == "the adapter itself" else base
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    message = f"the adapter {adapter} belongs to {base}, which is no folder of a model here: write"
    assert run(inputs, tmp_path / "out", model=adapter, lora_r=None) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="which is no folder of a model here"):
        check_models([str(adapter)])
    merge_to_base = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--base", str(inputs / "model")]
    (adapter / "adapter_model.safetensors").unlink()
    assert cli.main(merge_to_base) == 2
    assert f"{adapter} has no adapter_model.safetensors" in capsys.readouterr().err


def test_an_adapter_is_planned_as_what_it_is(trained, capsys):
    def plan(*flags: str) -> int:
        return cli.main(["plan", "--model", str(trained), "--gpus", "1", "--gpu", "h100", *flags])

    assert plan() == 0
    assert f"--lora-r {RANK}" in capsys.readouterr().out
    assert plan("--lora-r", "8") == 2
    assert f"--lora-r is 8, and the adapter {trained}" in capsys.readouterr().err


def test_bad_settings_are_refused(inputs, tmp_path, capsys, monkeypatch):
    def error(**changes: object) -> str:
        assert run(inputs, tmp_path / "out", **changes) == 2
        return capsys.readouterr().err

    assert "--quantize is nf4, and --lora-r 0" in error(lora_r=0, quantize="nf4")
    assert "--quantize nf4 does not go with --dtype float64" in error(quantize="nf4", dtype="float64")
    assert "--lora-train is norms, and --lora-r 0" in error(lora_r=0, lora_train=["norms"])
    assert "--lora-targets names q, and the linear layers" in error(lora_targets=["q", "v_proj"])
    assert "--lora-dropout is 1, outside 0 .. 1" in error(lora_dropout=1)
    again = error(lora_dropout=0.1, checkpoint_every=4)
    assert "--lora-dropout is 0.1" in again
    assert "--checkpoint-every 4 has parts made again" in again
    assert "--lora-r is -1" in error(lora_r=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'needs the package peft, which is not installed: pip install "easyctx[lora]"' in error()
    assert "--optimizer adamw_8bit needs the package bitsandbytes" in error(lora_r=0, optimizer="adamw_8bit")


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MULTI_GPU])
def test_engines_that_cannot_are_refused(kind, monkeypatch):
    """Each tried: ZeRO-3 with 4-bit weights ends in transformers, a step of 8-bit AdamW on DTensors in bitsandbytes."""
    monkeypatch.setattr(adapter_settings, "engine_name", lambda accelerator: "the engine")
    accelerator = SimpleNamespace(distributed_type=kind)
    in_4_bits, lora = AdapterSettings(4, quantize="nf4"), AdapterSettings(4)
    if kind == DistributedType.DEEPSPEED:
        with pytest.raises(ValueError, match="--quantize nf4 does not go with the engine.*fsdp2.yaml"):
            check_adapter_engine(in_4_bits, "adamw", accelerator)
    else:
        check_adapter_engine(in_4_bits, "adamw", accelerator)
    if kind == DistributedType.MULTI_GPU:
        check_adapter_engine(in_4_bits, "paged_adamw_8bit", accelerator)
    else:
        with pytest.raises(ValueError, match="--optimizer adamw_8bit does not go with the engine.*--optimizer adamw,"):
            check_adapter_engine(lora, "adamw_8bit", accelerator)


@pytest.mark.launch
def test_zero3_takes_the_same_steps_and_gives_them_back(inputs, tmp_path):
    if importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None:
        pytest.skip("needs DeepSpeed and a C++ compiler: pip install 'easyctx[deepspeed]'")
    changes = dict(gradient_accumulate_every=1, save_every=2, lora_r=RANK, lora_train="norms")
    alone, sharded = tmp_path / "alone", tmp_path / "zero3"
    assert run(inputs, alone, **changes) == 0
    arguments = flags(inputs, sharded, parallel_mode="zigzag_ring_attn", **changes)
    forked_launch("zero3.yaml", arguments, "--num_processes", "2", "--mixed_precision", "no")
    check_close(alone, sharded)
    for name in ("config.json", "easyctx_run.json", "adapter_model.safetensors"):
        (sharded / name).unlink()
    assert run(inputs, sharded, resume=True, **changes) == 0  # the third step again, in one process
    check_close(alone, sharded)


def check_close(one: Path, other: Path) -> None:
    """The adapters of two runs: Adam's steps are as long as the rate, whatever the gradient, so by most of them."""
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm(), name
