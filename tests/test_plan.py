"""`easyctx plan`: what it prints and writes holds together, and mistakes are told in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, LlamaConfig

from easyctx.cli import build_parser, main
from easyctx.cost.command import make_request
from easyctx.cost.hardware import DEVICES, GIB
from easyctx.cost.models import windows_of
from easyctx.cost.plan import PLAN_ENGINES, Request, decide_at, longest_length, make_plan, setting_at, step_at
from easyctx.cost.plan_report import as_json, launch
from easyctx.memory.adapters import shape_of_run
from easyctx.memory.budget import Choices, LayerChoice, MemoryShape, predict
from easyctx.memory.policy import DoesNotFit
from easyctx.training.flags import parse_arguments

# Two wide layers: as much memory a token as in a large model, and quick to decide about.
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
)


def request(**changes: Any) -> Request:
    wanted: dict[str, Any] = {"gpu_memory": 12 * GIB, "host_memory": 40 * GIB, "engine": "zero3_offload"}
    wanted |= {"gpus": 4, "nodes": 1} | changes
    return Request(MemoryShape.from_config(CONFIG), windows_of(CONFIG), DEVICES["h100"], **wanted)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    CONFIG.save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.parametrize("engine", PLAN_ENGINES)
def test_the_longest_length_fits_and_a_longer_one_does_not(engine: str) -> None:
    asked = request(engine=engine, mode="zigzag_ring_attn")
    longest = longest_length(asked, asked.mode, None)
    assert longest > 0
    found = decide_at(asked, asked.mode, None, longest)
    assert found.predicted.gpu_peak <= asked.budget.gpu
    assert found.predicted.host_peak <= asked.budget.host
    with pytest.raises(DoesNotFit):
        decide_at(asked, asked.mode, None, longest + 1024 * 4)


def test_the_longest_length_fits_with_few_logits() -> None:
    """So few that the train loop would hold them all, and these are too many: the command asks for tiles."""
    plan = make_plan(request(gpus=1, gpu_memory=2.5 * GIB))
    assert plan.decision is not None
    assert not setting_at(plan.request, plan.mode, None, plan.length).tiled_loss
    assert " ".join(launch(plan, "m")).endswith(" --loss tiled")
    assert "--loss" not in " ".join(launch(make_plan(replace(plan.request, seq_length=1024)), "m"))


def test_the_json_says_whether_weights_are_pinned() -> None:
    plan = make_plan(request(engine="fsdp2_offload", seq_length=8192))
    assert plan.decision is not None
    unpinned = replace(plan, decision=replace(plan.decision, pins=False))
    never, too_long = (make_plan(request(seq_length=length)) for length in (8192, 100_000_000))
    assert [as_json(each, "m", "")["pins"] for each in (plan, unpinned, never, too_long)] == [True, False, False, None]


def test_more_memory_and_more_gpus_take_longer_sequences() -> None:
    def longest(**changes: Any) -> int:
        return longest_length(request(**changes), "zigzag_ring_attn", None)

    assert longest() < longest(gpu_memory=16 * GIB)
    assert longest() < longest(gpus=8, host_memory=80 * GIB)
    assert longest(engine="zero3") < longest()
    assert longest(batch=2) <= longest() / 2


def test_a_plan_holds_together() -> None:
    plan = make_plan(request(seq_length=65536))
    assert plan.decision is not None
    assert plan.length == 65536 < plan.longest
    assert {"zigzag_ring_attn", "ring_attn", "ulysses_attn", "striped_attn", "dist_flash_attn"} < set(plan.steps)
    assert any(name.startswith("usp_attn (ring ") for name in plan.steps)
    seconds = [cost.seconds for cost in plan.steps.values()]
    assert seconds == sorted(seconds)
    for cost in plan.steps.values():
        assert cost.tokens_per_s == pytest.approx(65536 / cost.seconds)
        assert 0 < cost.mfu < 1


def test_one_gpu_and_data_parallel() -> None:
    for changes in ({"gpus": 1}, {"mode": "data_parallel"}, {"sp_degree": 1}):
        plan = make_plan(request(seq_length=8192, **changes))
        assert plan.mode == "data_parallel"
        assert set(plan.steps) == {"data_parallel"}


def test_what_shares_a_sequence_may_be_fewer_gpus() -> None:
    plan = make_plan(request(gpus=8, nodes=2, sp_degree=4, seq_length=16384, mode="zigzag_ring_attn"))
    assert plan.request.cluster.nodes == 1
    assert plan.steps["zigzag_ring_attn"].tokens == 2 * 16384
    assert "--sp-degree 4" in launch(plan, "m")[-1]


@pytest.mark.parametrize("engine", PLAN_ENGINES)
@pytest.mark.parametrize("mode", ["auto", "usp_attn"])
def test_the_launch_command_is_one_that_both_programs_take(engine: str, mode: str) -> None:
    degree = 2 if mode == "usp_attn" else None
    plan = make_plan(request(engine=engine, nodes=2, seq_length=8192, mode=mode, ring_degree=degree))
    words = " ".join(line.rstrip("\\") for line in launch(plan, "some/model")).replace("RANK", "0").split()
    assert words[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(words[2:])
    assert args.num_processes == 4
    assert Path(args.config_file).is_file()
    assert args.config_file == f"accelerate_configs/{engine}.yaml"
    config = parse_arguments(args.training_script_args)
    assert (config.parallel_mode, config.ring_degree, config.seq_length) == (plan.mode, plan.ring_degree, 8192)


def test_liger_is_planned_as_the_train_loop_plans_it(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer sequences fit, a step takes less time, and the command that is printed has the flag."""
    argv = ["plan", "--model", config_file, "--gpus", "4", "--gpu-memory", "12", "--host-memory", "40", "--lora-r", "8"]
    plans = {}
    for flags in ((), ("--liger",)):
        args = build_parser("plan").parse_args([*argv, "--seq-length", "65536", *flags])
        asked, _ = make_request(args)
        assert asked.model.fused == bool(flags)
        plans[flags] = make_plan(asked)
        config = parse_arguments(["--model", "m", "--dataset", "d", "--output-dir", "o", "--lora-r", "8", *flags])
        assert asked.model == shape_of_run(config, CONFIG), "what `easyctx.training.memory` plans with"
        words = " ".join(line.rstrip("\\") for line in launch(plans[flags], "m")).split("easyctx.train")[1]
        assert parse_arguments(words.split()).liger == bool(flags)
    stock, liger = plans[()], plans[("--liger",)]
    assert liger.longest >= stock.longest
    whole = Choices.alike(2, LayerChoice(everything=True))
    setting = setting_at(stock.request, "zigzag_ring_attn", None, 65536)
    assert predict(liger.request.model, setting, whole).gpu_peak < predict(stock.request.model, setting, whole).gpu_peak
    steps = [step_at(plan.request, "ring_attn", None, 65536, whole) for plan in (stock, liger)]
    between = [step.parts["norms, RoPE, MLP activation, loss"] for step in steps]
    assert between[1] < between[0]
    assert main([*argv, "--seq-length", "65536", "--liger"]) == 0
    said = capsys.readouterr().out
    assert "; Liger's kernels\n" in said
    assert "    --lora-r 8 --liger\n" in said


def test_muon_is_planned_where_it_steps(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", config_file, "--gpus", "2", "--seq-length", "8192"]
    assert main([*argv, "--optimizer", "muon"]) == 0
    said = capsys.readouterr().out
    assert "engine ddp" in said
    assert "    --optimizer muon\n" in said
    ddp = request(engine="ddp", gpu_memory=20 * GIB)
    assert longest_length(ddp, "ring_attn", None) < longest_length(replace(ddp, optimizer="muon"), "ring_attn", None)


def test_a_model_that_sees_images_is_planned_by_its_text_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
    AutoConfig.for_model("gemma3", text_config=small).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpus", "2", "--seq-length", "4096"]) == 0
    assert "config.json, the text part of gemma3 alone)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "has num_attention_heads 16 and num_key_value_heads 3"),
        ({"vocab_size": 0}, "has vocab_size 0: make it a whole number of at least 1"),
        ({"model_type": "bloom"}, "is of bloom: name one of these"),
        ({"model_type": "no_such"}, "has model_type 'no_such'"),
        ({"num_attention_heads": "four"}, "is no valid llama configuration"),
    ],
)
def test_sizes_that_no_plan_is_for(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | changes))
    assert main(["plan", "--model", str(tmp_path), "--gpus", "4"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_command_writes_its_files(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", config_file, "--gpus", "4", "--gpu-memory", "12", "--host-memory", "40"]
    argv += ["--seq-length", "65536", "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())
    assert f"longest sequence that fits: {found['longest_seq_length']:,} tokens" in said
    assert "nothing was run" in said
    assert f"\n  {found['parallel_mode']} *" in said
    for place in ("gpu", "host"):
        terms = found[f"predicted_{place}_bytes"]
        assert sum(size for name, size in terms.items() if name != "peak") == terms["peak"]
        assert f"{terms['peak'] / GIB:.2f}" in said
    for cost in found["predicted_steps"].values():
        assert sum(cost["parts"].values()) == pytest.approx(cost["seconds"])
    assert found["launch"].startswith("accelerate launch --config_file accelerate_configs/zero3_offload.yaml")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.json", "p.png"]


def test_a_length_that_does_not_fit_is_refused_with_the_longest(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--model", config_file, "--gpus", "4", "--gpu-memory", "12", "--host-memory", "40"]
    assert main([*argv, "--seq-length", "100000000", "--json", str(tmp_path / "p.json")]) == 1
    said, found = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "--seq-length 100000000 (25,000,000 tokens a rank, 4 ranks to a sequence) does not fit" in said
    assert f"the longest that fits is about --seq-length {found['longest_seq_length']}" in said
    assert (found["fits"], found["launch"]) == (False, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 4 --gpu t4", "no rates are known for GPU 't4': choose one of h100"),
        ("--gpus 4 --nodes 3", "--gpus 4 do not divide into --nodes 3"),
        ("--gpus 4 --nodes 0", "--nodes is 0, and must be at least 1"),
        ("--gpus 0", "--gpus is 0, and must be at least 1"),
        ("--gpus 99999", "--gpus is 99999, and plans are made for at most 16,384"),
        ("--gpus 4 --sp-degree 3", "--sp-degree 3 does not divide the 4 GPUs of --gpus: use one of [1, 2, 4]"),
        ("--gpus 4 --sp-degree 2 --parallel_mode data_parallel", "data_parallel has a sequence-parallel degree of 1"),
        ("--gpus 1 --ring_degree 2", "data_parallel has a ring degree of 1, got 2"),
        ("--gpus 4 --quantize nf4", "--quantize is nf4, and --lora-r 0: give a rank"),
        ("--gpus 4 --optimizer muon --engine fsdp2", "--optimizer muon does not step what --engine fsdp2 shards"),
        ("--gpus 4 --optimizer muon --lora-r 8", "--optimizer muon is for whole matrices, and --lora-r is 8"),
        ("--gpus 4 --optimizer muon --gpu-memory 3", "Take --optimizer adamw and an engine that offloads"),
        (
            "--gpus 1 --gpu-memory 1.2 --lora-r 8 --quantize nf4 --optimizer adamw_8bit",
            "Take --optimizer adamw and an engine that offloads (--engine fsdp2_offload), more GPUs",
        ),
        ("--gpus 4 --sp-degree 0", "--sp-degree 0 does not divide the 4 GPUs"),
        ("--gpus 4 --batch-size 0", "--batch-size is 0, and must be at least 1"),
        ("--gpus 4 --seq-length 1", "a sequence needs at least 2 tokens"),
        ("--gpus 4 --gpu-memory 1", "--gpu-memory is 1 GiB, and CUDA and NCCL alone take 1 GiB"),
        ("--gpus 4 --gpu-memory -1", "--gpu-memory is -1.0, and must be positive"),
        ("--gpus 4 --gpu-memory 0", "--gpu-memory is 0.0, and must be positive GiB, such as 80"),
        ("--gpus 4 --host-memory inf", "--host-memory is inf, and must be positive"),
        ("--gpus 4 --seq-length 0", "--seq-length is 0, and a sequence needs at least 2 tokens"),
        ("--gpus 4 --gpu a100 --attn-kernel flash4", "flash4 runs on Hopper and Blackwell GPUs, and a100-80gb is none"),
        ("--gpus 4 --json .", "--json . is a folder: name a file in it"),
        (
            "--gpus 4 --gpu-memory 3 --engine ddp",
            "does not fit at any length with --engine ddp: 1024 tokens a GPU take",
        ),
        ("--gpus 1 --parallel_mode ring_attn", "ring_attn shares a sequence among 2 or more GPUs"),
        ("--gpus 4 --parallel_mode usp_attn", "usp_attn needs a ring degree"),
        ("--gpus 4 --ring_degree 3", "no mode has a ring degree of 3 over 4 GPUs"),
        ("--gpus 6 --parallel_mode ulysses_attn", "Ulysses cannot share 16 query and 8 key/value heads out to 6 ranks"),
        ("--gpus 4 --attn-kernel fast", "no rates are known for attention kernel 'fast'"),
        ("--gpus 4 --plot p.pdf", "--plot p.pdf must end in .png"),
        ("--gpus 4 --json no/such/p.json", "--json no/such/p.json: there is no folder no/such"),
        ("--gpus 4 --rates none.json", "--rates none.json cannot be read as JSON"),
    ],
)
def test_mistakes_are_one_line(
    config_file: str, flags: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model", config_file, *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_an_unknown_model_is_told_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "./nothing", "--gpus", "4"]) == 2
    assert "known here without a file: llama-2-7b, llama-2-13b, llama-33b, llama-3-8b" in capsys.readouterr().err


def test_slower_rates_of_a_file_show(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", config_file, "--gpus", "2", "--seq-length", "8192", "--json"]
    assert main([*argv, str(tmp_path / "fast.json")]) == 0
    rates = {"dense_flops": DEVICES["h100"].dense_flops / 3}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    assert main([*argv, str(tmp_path / "slow.json"), "--rates", str(tmp_path / "rates.json")]) == 0
    capsys.readouterr()
    fast, slow = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("fast", "slow"))
    mode = fast["parallel_mode"]
    assert slow["predicted_steps"][mode]["seconds"] > fast["predicted_steps"][mode]["seconds"]
