"""The scripts of LoRA and QLoRA runs, in miniature: the very same files, on a tiny model and a CPU."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyctx import cli, train
from easyctx.data.load import load_tokenised
from easyctx.evals import needle, perplexity
from easyctx.training.flags import parse_arguments
from tests.train_helpers import ROOT, make_inputs

SCRIPTS = ("anima_7b_100k", "anima_33b_qlora", "qlora_33b_100k")
SOURCE, TARGET, RECORDS = 400, 12, 12
# Takes a program's place on the PATH and only writes down how it was called.
NOTES_ITS_CALL = f"""#!{sys.executable}
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""
# In the place of `accelerate launch` of two processes and of `easyctx`, for the one run in full.
BY_MODULE = '#!/bin/sh\nexec {python} -m {module} "$@"\n'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, `qa.jsonl` with documents from short to too long, and a haystack."""
    folder = make_inputs(tmp_path_factory.mktemp("lora"), vocab_size=512)
    sentence = "The cat sat on the mat, and number {} was there. "
    records = [
        {
            "document": "".join(sentence.format(n) for n in range(1 + 3 * number)),
            "question": f"Where sat cat {number}?",
            "answers": [f"On mat {number}.", "A mat."],
        }
        for number in range(RECORDS)
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "hay.txt").write_text("".join(sentence.format(n) for n in range(400)))
    return folder


def programs(folder: Path, texts: dict[str, str]) -> str:
    """A PATH on which these programs come first."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755 | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def settings(inputs: Path, output: Path, **more: str) -> dict[str, str]:
    return {
        "MODEL": str(inputs / "model"),
        "DATA": str(inputs / "qa.jsonl"),
        "OUTPUT": str(output),
        "HAYSTACK": str(inputs / "hay.txt"),
        "ENGINE": "cpu",
        "SOURCE_TOKENS": str(SOURCE),
        "TARGET_TOKENS": str(TARGET),
        "VALIDATION": "0.2",
        "BUCKETS": "3",
        "STEPS": "2",
        "ACCUMULATE": "2",
        "SAVE_EVERY": "1",
        "SAMPLE_EVERY": "1",
        "SAMPLE_TOKENS": "4",
        "DEPTHS": "2",
        "EVAL_LENGTHS": str(SOURCE + TARGET),
        "MERGE": "yes",
        "TRAIN_FLAGS": "--tracker none --keep-inputs host --eval-rows 1",
    } | more


def run_script(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"train_scripts/{name}.sh"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run_here(words: list[str]) -> int:
    """A noted command, in this process."""
    if words[0] == "easyctx":
        return cli.main(words[1:])
    mains = {"easyctx.train": train.main, "eval/needle.py": needle.main, "eval/perplexity.py": perplexity.main}
    (at,) = [index for index, word in enumerate(words) if word in mains]
    return mains[words[at]](words[at + 1 :])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_miniature_of_each(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own commands, one after the other."""
    monkeypatch.chdir(ROOT)
    path = programs(tmp_path / "bin", dict.fromkeys(("accelerate", "easyctx"), NOTES_ITS_CALL))
    output = tmp_path / "out"
    environment = settings(inputs, output, PATH=path, CALLS=str(tmp_path / "calls"))
    done = run_script(name, environment)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [
        next(w for w in call if w in ("data", "merge", "easyctx.train") or w.startswith("eval/")) for call in calls
    ] == [
        "data",
        "easyctx.train",
        "eval/needle.py",
        "eval/perplexity.py",
        "merge",
    ]
    for call in calls:
        assert run_here(call) == 0, call
    rows = load_tokenised(output / "data")
    assert max(map(len, rows["input_ids"])) <= SOURCE + TARGET
    assert len(set(map(len, rows["input_ids"]))) > 3
    samples = [json.loads(line) for line in (output / "adapter" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [(step, n) for step in (1, 2) for n in range(4)]
    assert (output / "needle" / "results.jsonl").exists() or list((output / "needle").rglob("*.json"))
    start = AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged").state_dict()
    assert any(not torch.equal(start[key], merged[key]) for key in start)
    (tmp_path / "calls").unlink()
    assert run_script(name, environment).returncode == 0
    again = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call for call in again if call[0] == "easyctx"] == [], "neither data nor merged weights are made twice"
    assert run_here(again[0]) == 0


@pytest.mark.launch
def test_the_100k_script_on_two_processes(inputs: Path, tmp_path: Path) -> None:
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "easyctx": "easyctx.cli"}
    texts = {name: BY_MODULE.format(python=sys.executable, module=module) for name, module in modules.items()}
    path = programs(tmp_path / "bin", texts)
    output = tmp_path / "out"
    short = dict(PROCESSES="2", HAYSTACK="", MERGE="no", SOURCE_TOKENS="100", STEPS="1", SAMPLE_TOKENS="2")
    done = run_script("anima_7b_100k", settings(inputs, output, PATH=path, **short))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "zigzag_ring_attn, SP 2 x DP 1, DDP on cpu; rows of" in done.stdout
    assert "are padded to 3 lengths" in done.stdout
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    assert len((output / "adapter" / "samples.jsonl").read_text().splitlines()) == 4


def noted(name: str, tmp_path: Path, **more: str) -> list[list[str]]:
    path = programs(tmp_path / "bin", dict.fromkeys(("accelerate", "easyctx"), NOTES_ITS_CALL))
    (tmp_path / "qa.jsonl").write_text("{}\n")
    given = {"DATA": str(tmp_path / "qa.jsonl"), "OUTPUT": str(tmp_path / "out"), "PATH": path}
    done = run_script(name, given | {"CALLS": str(tmp_path / "calls")} | more)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "r", "alpha", "source", "target", "steps", "quantize"),
    [
        ("anima_7b_100k", 32, 32, 92_000, 1024, 500, None),
        ("anima_33b_qlora", 64, 16, 512, 512, 10_000, "nf4"),
        ("qlora_33b_100k", 64, 16, 98_976, 1024, 500, "nf4"),
    ],
)
def test_the_settings_are_those_of_the_published_runs(
    name: str, r: int, alpha: int, source: int, target: int, steps: int, quantize: str | None, tmp_path: Path
) -> None:
    data, training = noted(name, tmp_path)
    limits = [data[data.index(flag) + 1] for flag in ("--max-source-tokens", "--max-target-tokens")]
    assert limits == [str(source), str(target)]
    config = parse_arguments(training[training.index("easyctx.train") + 1 :])
    assert (config.lora_r, config.lora_alpha, config.quantize, config.double_quant) == (r, alpha, quantize, True)
    assert (config.seq_length, config.max_train_steps, config.learning_rate) == (source + target, steps, 1e-4)
    assert config.batch_size * config.gradient_accumulate_every == 16
    assert (config.optimizer, config.parallel_mode) == ("paged_adamw_8bit", "data_parallel")


def test_what_a_script_lacks_is_named(tmp_path: Path) -> None:
    for name in SCRIPTS:
        done = run_script(name, {"DATA": ""})
        assert done.returncode == 2
        assert done.stderr.startswith("error: DATA is not set: ")
        assert "JSON lines with document, question and answer" in done.stderr
    done = run_script("long_qa", {})
    assert done.returncode == 2
    assert "run train_scripts/anima_7b_100k.sh" in done.stderr
    path = programs(tmp_path / "bin", dict.fromkeys(("accelerate", "easyctx"), NOTES_ITS_CALL))
    given = {"DATA": "org/questions", "OUTPUT": str(tmp_path / "out"), "PATH": path, "CALLS": str(tmp_path / "calls")}
    done = run_script(SCRIPTS[0], given)
    assert done.returncode == 2
    assert "DATA org/questions is no .jsonl file: name SAMPLE_PROMPTS" in done.stderr
