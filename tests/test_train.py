"""The train loop as users start it: real launches compared with one process, and every refusal before loading."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from easyctx import cli, train
from easyctx.training.checkpoint_files import PROBE
from easyctx.training.model import set_rope
from easyctx.training.saving import check_saved, publish
from tests.forked_launch import forked_launch
from tests.models import VOCAB, tiny_config, tiny_model
from tests.train_helpers import LENGTH, accelerate, flags, launch, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def one_process(inputs, tmp_path_factory) -> Path:
    """The output of one process, which every launch must reproduce."""
    output = tmp_path_factory.mktemp("one") / "out"
    assert train.main(flags(inputs, output)) == 0
    return output


def check_same_run(output: Path, want: Path) -> None:
    """Losses and gradient norms of the first and the last step agree in float32."""
    card, wanted = (json.loads((folder / "easyctx_run.json").read_text()) for folder in (output, want))
    for step in ("first_step", "last_step"):
        for what in ("loss", "grad_norm"):
            assert card[step][what] == pytest.approx(wanted[step][what], rel=1e-5), (step, what)


def test_output_loads_again(inputs, one_process):
    model = AutoModelForCausalLM.from_pretrained(one_process)
    assert model.config.rope_parameters["rope_theta"] == 1e5
    assert AutoTokenizer.from_pretrained(one_process).encode("cat")
    start = AutoModelForCausalLM.from_pretrained(inputs / "model")
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)
    names = {path.name for path in one_process.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "easyctx_run.json"} <= names
    assert not [name for name in names if name.endswith((".partial", ".tmp", ".bin"))]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_saved(family, inputs, tmp_path, capsys):
    """A mixture's files hold its experts one by one: they load again as what was trained, and can be trained on."""
    start = tiny_model(family, torch.float32)
    start.save_pretrained(tmp_path / "start")
    changes = dict(max_train_steps=1, rope_theta=None)
    assert train.main(flags(inputs, tmp_path / "out", model=tmp_path / "start", **changes)) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as tensors:
        assert [name for name in tensors.keys() if ".experts.1." in name]  # noqa: SIM118  (not a dict)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(trained) == set(start.state_dict())
    moved = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, trained[name])}
    assert {name for name in trained if "experts" in name} <= moved
    close = {name: (trained[name] - tensor).abs().max() < 0.05 for name, tensor in start.state_dict().items()}
    assert all(close.values()), "a step of 1e-2 moves no weight far: experts were mixed up"
    assert train.main(flags(inputs, tmp_path / "on", model=tmp_path / "out", **changes)) == 0


@pytest.mark.launch
def test_two_processes_zigzag(inputs, one_process, tmp_path):
    arguments = flags(inputs, tmp_path / "out", parallel_mode="zigzag_ring_attn", tracker="tensorboard")
    said = forked_launch("cpu.yaml", arguments)
    assert "zigzag_ring_attn, SP 2 x DP 1, DDP on cpu; 101 tokens a sequence, 51 a rank" in said
    assert "global batch 6 sequences = 606 tokens a step" in said
    assert said.count("attention kernel for") == 1
    check_same_run(tmp_path / "out", one_process)
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


@pytest.mark.launch
def test_zero3(inputs, one_process, tmp_path):
    """Sharded over four ranks, SP x DP, with accumulation and all that saves memory; test_resume.py offloads it."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install 'easyctx[deepspeed]'")
    memory = dict(keep_inputs="host", keep_attention="host", checkpoint_every=2, mlp_tile=9, tiled_norms="yes")
    changes: dict[str, object] = dict(batch_size=1, gradient_accumulate_every=3, sp_degree=2, loss="tiled", **memory)
    arguments = flags(inputs, tmp_path / "out", parallel_mode="zigzag_ring_attn", **changes)
    said = launch(accelerate("zero3.yaml", arguments, "--num_processes", "4", "--mixed_precision", "no"))
    assert "SP 2 x DP 2" in said
    assert "DeepSpeed ZeRO-3" in said
    assert "offloaded" not in said
    check_same_run(tmp_path / "out", one_process)
    got, want = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "out", one_process))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-4)


def test_a_new_rope_base_is_that_of_the_layers_that_see_everything():
    gemma = tiny_config("gemma3_text")
    sliding = dict(gemma.rope_parameters["sliding_attention"])
    set_rope(gemma, 5e6, seq_length=9000)
    assert gemma.rope_parameters["full_attention"]["rope_theta"] == 5e6
    assert gemma.rope_parameters["sliding_attention"] == sliding
    assert gemma.max_position_embeddings == 9000
    llama = tiny_config("llama")
    set_rope(llama, 5e6, seq_length=9000)
    assert (llama.rope_parameters["rope_theta"], llama.max_position_embeddings) == (5e6, 9000)


def test_saving_replaces_a_run_whole(tmp_path):
    """Files of a sharded older run do not stay beside the new weights, and what is saved can be read by others."""
    partial, output = tmp_path / "out" / ".partial", tmp_path / "out"
    partial.mkdir(parents=True)
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"]
    for name in old:
        (output / name).write_text("old")
    for name in ("model.safetensors", "config.json"):
        (partial / name).write_text("new")
    (partial / "model.safetensors").chmod(0o600)
    publish(partial, output)
    assert {p.name: p.read_text() for p in output.iterdir()} == {
        "model.safetensors": "new",
        "config.json": "new",
        "notes.txt": "old",
    }
    assert (output / "model.safetensors").stat().st_mode & 0o400
    assert (output / "model.safetensors").stat().st_mode == (output / "notes.txt").stat().st_mode


def test_saved_weights_are_compared_with_memory(tmp_path):
    """The check after saving cannot pass on a file that lacks a tensor or holds another value."""
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    save_file(state, tmp_path / "model.safetensors")
    check_saved(tmp_path, state)
    with pytest.raises(RuntimeError, match="not written: c"):
        check_saved(tmp_path, state | {"c": torch.ones(1)})
    with pytest.raises(RuntimeError, match="does not hold the trained value of 'b'"):
        check_saved(tmp_path, state | {"b": torch.ones(3)})


def test_rows_of_another_tokenizer_are_refused(capsys, tmp_path):
    """Their ids are within the vocabulary and mean other tokens; also for validation, and not for the model's own."""
    inputs = make_inputs(tmp_path / "inputs", vocab_size=400)
    text, other = tmp_path / "text.txt", tmp_path / "other"
    text.write_text("the cat sat on the mat and looked at the sky " * 99)
    model = AutoTokenizer.from_pretrained(inputs / "model")
    swapped = json.loads(model.backend_tokenizer.to_str())
    words = swapped["model"]["vocab"]
    one, two = sorted(words, key=words.get)[-2:]
    words[one], words[two] = words[two], words[one]
    model.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    for name, tokenizer in (("own", inputs / "model"), ("foreign", other)):
        command = ["data", str(text), "--tokenizer", str(tokenizer), "--seq-length", str(LENGTH)]
        assert cli.main([*command, "--output", str(tmp_path / name)]) == 0
    said = refused(capsys, inputs, tmp_path / "out", dataset=tmp_path / "foreign")
    assert f"{tmp_path / 'foreign'} was tokenised with {other} (vocabulary " in said
    assert f"{inputs / 'model'} has the vocabulary" in said
    changes = dict(dataset=tmp_path / "own", eval_dataset=tmp_path / "foreign", eval_every=1)
    assert "--eval-dataset" in refused(capsys, inputs, tmp_path / "out", **changes)
    own = flags(inputs, tmp_path / "out", dataset=tmp_path / "own", max_train_steps=1)
    assert train.main(own) == 0
    model.add_special_tokens({"pad_token": "[PAD]"})  # behind the others, whose ids stay
    model.save_pretrained(inputs / "model")
    assert train.main(flags(inputs, tmp_path / "padded", dataset=tmp_path / "own", max_train_steps=1)) == 0
    said = refused(capsys, inputs, tmp_path / "other_out", dataset=tmp_path / "foreign")
    assert re.search(r"has the vocabulary \w+ up to id \d+, in which tokens have other ids", said)


def refused(capsys, inputs: Path, output: Path, **changes: object) -> str:
    """What the train loop says, on one line, when it refuses; it must not have loaded a model."""

    def must_not_load(*_: object) -> None:
        raise AssertionError("the model was loaded before the input was refused")

    before = sorted(output.iterdir()) if output.exists() else None
    original, train.load_model = train.load_model, must_not_load
    try:
        assert train.main(flags(inputs, output, **changes)) == 2
    finally:
        train.load_model = original
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert before == (sorted(output.iterdir()) if output.exists() else None)
    return said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(parallel_mode="ring_attn"), "this run has 1 process: launch more"),
        (dict(sp_degree=2), "data_parallel has a sequence-parallel degree of 1, got 2"),
        (dict(seq_length=200), "200"),
        (dict(dataset="/nowhere/data"), "/nowhere/data"),
        (dict(model="/nowhere/model"), "/nowhere/model is no folder here"),
        (dict(batch_size=0), "--batch-size is 0, and must be at least 1"),
        (dict(seq_length=1), "--seq-length is 1"),
        (dict(learning_rate=0), "--learning-rate is 0.0"),
        (dict(rope_theta=-1), "--rope-theta is -1.0"),
        (dict(warmup_steps=9), "--warmup-steps is 9, outside 0 .. 3"),
        (dict(ring_degree=2), "data_parallel has a ring degree of 1, got 2"),
        (dict(tracker="wandb"), "pip install wandb"),
        (dict(memory="off", mlp_tile=64), "--memory off leaves the model as it is: leave out --mlp-tile"),
        (dict(recompute="none", checkpoint_every=2), "--recompute none keeps everything, and --checkpoint-every"),
        (dict(recompute="all", keep_attention="gpu"), "--recompute all contradicts --keep-attention gpu"),
        (dict(head_groups=3), "--head-groups 3 does not fit 2 key/value heads: use one of 1, 2"),
        (dict(checkpoint_every=9), "--checkpoint-every is 9, outside 1 .. 2 layers"),
        (dict(mlp_tile=-1), "--mlp-tile is -1, and must be at least 0"),
        (dict(host_memory=0), "--host-memory is 0.0 GiB, and must be positive"),
        (dict(keep_inputs="host", host_memory=1e-6), "GiB of host memory are needed"),
        (dict(keep_inputs="host", gpu_memory=1e-4), "does not fit, however it is kept"),
        (dict(keep_checkpoints=0), "--keep-checkpoints is 0, and must be at least 1"),
        (dict(save_every=-1), "--save-every is -1, and must be at least 0"),
        (dict(resume="/nowhere/run"), "--resume /nowhere/run holds no checkpoint"),
        (dict(profile="3"), "--profile is 3: give STEP:COUNT"),
        (dict(eval_every=2), "--eval-every is 2 and --eval-dataset None: give both or neither"),
        (dict(eval_lengths=200), "--eval-lengths are [200], outside 2 .. 101"),
        (dict(max_shard_size="5"), "--max-shard-size is 5: give a number and a unit"),
        (dict(eval_every=2, eval_dataset="/nowhere/eval"), "/nowhere/eval"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(capsys, inputs, tmp_path, changes, message):
    if changes.get("tracker") == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    assert message in refused(capsys, inputs, tmp_path / "out", **changes)


def test_refuses_rows_it_cannot_train_on(capsys, inputs, tmp_path):
    def rows(name: str, **columns: list) -> Path:
        Dataset.from_dict(columns).save_to_disk(tmp_path / name)
        return tmp_path / name

    beyond = rows("beyond", input_ids=[[3] * 110, [VOCAB] * 110])
    said = refused(capsys, inputs, tmp_path / "out", dataset=beyond)
    assert f"{VOCAB}" in said
    missing = rows("missing", text=["a"])
    assert "input_ids" in refused(capsys, inputs, tmp_path / "out", dataset=missing)
    twice = rows("twice", input_ids=[[3] * 110], document_ids=[[0] * 110], cu_seqlens=[[0, 110]])
    assert "--ignore-borders" in refused(capsys, inputs, tmp_path / "out", dataset=twice)
    back = rows("back", input_ids=[[3] * 110] * 3, document_ids=[[0] * 110, [0] * 110, [1] * 50 + [0] * 60])
    assert "row 2" in refused(capsys, inputs, tmp_path / "out", dataset=back)
    skips = rows("skips", input_ids=[[3] * 110], position_ids=[[*range(50), *range(60, 120)]])
    assert "from 49 to 60 at position 50" in refused(capsys, inputs, tmp_path / "out", dataset=skips)
    short = rows("short", input_ids=[[3] * 110], cu_seqlens=[[0, 40, 100]])
    assert "cu_seqlens end at 100, but the row has 110 tokens" in refused(
        capsys, inputs, tmp_path / "out", dataset=short
    )


def test_refuses_an_output_folder_with_a_run(capsys, inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    assert "holds another run (model.safetensors, …)" in refused(capsys, inputs, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"
    said = refused(capsys, inputs, inputs / "model", overwrite=True)
    assert "--overwrite would write over the model that the run starts from" in said
    # What another rank tries the folder with is no run.
    (tmp_path / "tried").mkdir()
    (tmp_path / "tried" / f"{PROBE}_1_7").touch()
    assert "at least 1" in refused(capsys, inputs, tmp_path / "tried", keep_checkpoints=0)


def test_refuses_a_model_it_cannot_compute(capsys, inputs, tmp_path, monkeypatch):
    config = AutoConfig.from_pretrained(inputs / "model")
    config.attention_dropout = 0.1
    config.save_pretrained(tmp_path / "dropout")
    # The launch has two processes as far as the checks can see; none is started before the refusal.
    monkeypatch.setattr(train, "launched_processes", lambda: 2)
    monkeypatch.setattr(train, "make_mode_mesh", lambda *degrees: None)
    said = refused(capsys, inputs, tmp_path / "out", model=tmp_path / "dropout", parallel_mode="ring_attn")
    assert "attention_dropout is 0.1" in said


def test_unknown_mode_lists_the_modes(capsys, inputs, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(inputs, tmp_path / "out", parallel_mode="zigzag"))
    assert "zigzag_ring_attn" in capsys.readouterr().err
