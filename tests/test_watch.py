"""What is seen of a run while it goes on: hangs and deaths, steps that are not finite, perplexity, MFU."""

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from easyctx import apply_seq_parallel_monkey_patch, train
from easyctx.mesh import Mesh
from easyctx.modes import make_mode_mesh
from easyctx.training.card import write_model_card
from easyctx.training.flops import sequence_flops
from easyctx.training.heartbeat import Heartbeat
from easyctx.training.progress import Progress
from easyctx.training.validation import Validation, load_eval_rows
from tests.engine_jobs import LENGTH, Step, fresh_accelerator
from tests.models import VOCAB, tiny_model
from tests.pool import RankPool
from tests.train_helpers import flags, make_inputs

TIMEOUT, BOUND = 1.0, 30.0


class Told(Heartbeat):
    """Says what it has to say in a file."""

    folder: Path

    def _say(self, text: str) -> None:
        with (self.folder / str(self.rank)).open("a") as file:
            file.write(text + "\n")


def lose_a_rank(rank: int, world: int, folder: Path, how: str) -> None:
    """Step 7, in which rank 1 does not come to where rank 0 waits for it."""
    heartbeat = Told(Progress(step=6), TIMEOUT)
    heartbeat.folder = folder
    with heartbeat:
        dist.barrier()
        time.sleep(TIMEOUT)
        if rank == 1:
            {
                "hangs": lambda: time.sleep(100),
                "dies": lambda: os._exit(9),
                "fails": lambda: {}["no such key"],
            }[how]()
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("hangs", "rank 1: step 7, not waiting for others in "),
        ("dies", "rank 1 gives no sign of life, last seen in step 7"),
        ("fails", "rank 1 failed in step 7: KeyError: 'no such key'"),
    ],
)
def test_a_lost_rank_is_named_in_bounded_time(tmp_path, how, named):
    pool = RankPool(2)
    try:
        begin = time.monotonic()
        for pipe in pool._pipes:
            pipe.send((lose_a_rank, (tmp_path, how)))
        waited_for = {"fails": [0, 1], "hangs": [0, 1]}.get(how, [0])
        for rank in waited_for:  # each answers with its error, or its process ends
            assert pool._pipes[rank].poll(BOUND), f"rank {rank} still waits after {BOUND} s"
        said = "".join(path.read_text() for path in tmp_path.iterdir())
        assert named in said
        assert time.monotonic() - begin < BOUND
    finally:
        pool.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("watch"))


def spoil(monkeypatch, steps: set[int]) -> None:
    """Make the loss of the last micro-batch of these steps (from 1) infinite."""
    original, calls = train.token_loss, iter(range(1, 1000))

    def token_loss(*args: Any) -> tuple[torch.Tensor, Any]:
        loss, outputs = original(*args)
        return (loss * math.inf if next(calls) in {3 * step for step in steps} else loss), outputs

    monkeypatch.setattr(train, "token_loss", token_loss)


def test_steps_that_are_not_finite_are_skipped(inputs, tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 3})
    assert train.main(flags(inputs, tmp_path / "out", max_train_steps=5, max_skipped_steps=2)) == 0
    card = json.loads((tmp_path / "out" / "easyctx_run.json").read_text())
    assert card["skipped_steps"] == 2
    assert math.isfinite(card["last_step"]["loss"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(p.isfinite().all() for p in model.parameters())


def test_too_many_in_a_row_end_the_run(inputs, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {1, 3, 4, 5})
    assert train.main(flags(inputs, tmp_path / "out", max_train_steps=9, max_skipped_steps=2)) == 1
    said = capsys.readouterr().err
    assert "error: step 5: loss inf" in said
    assert "3 steps in a row were skipped, and --max-skipped-steps is 2" in said
    assert not (tmp_path / "out" / "config.json").exists()


def spoiled_step(rank: int, world: int) -> tuple[bool, float]:
    """A DDP step of two ranks of which one's loss is infinite; whether this rank's weights stayed, and the loss."""
    accelerator = fresh_accelerator()
    step = Step("zigzag_ring_attn", world)
    mesh = make_mode_mesh(step.mode, world)
    inner: Any = step.model()
    apply_seq_parallel_monkey_patch(step.mode, inner, mesh=mesh)
    model, optimizer = accelerator.prepare(inner, torch.optim.AdamW(inner.parameters(), 1.0))
    before = [p.clone() for p in inner.parameters()]
    settings = SimpleNamespace(
        parallel_mode=step.mode,
        seq_length=LENGTH,
        pose_length=None,
        gradient_accumulate_every=1,
        max_grad_norm=1.0,
        loss="full",
    )
    ids, labels, _ = step.data(1)
    original = train.token_loss
    if rank == 1:
        train.token_loss = lambda *args: (original(*args)[0] * math.inf, None)
    try:
        batches = iter([{"input_ids": ids, "labels": labels}])
        loss, _ = train.train_step(model, optimizer, batches, settings, inner.config, accelerator, mesh)
    finally:
        train.token_loss = original
    return all(torch.equal(a, b) for a, b in zip(before, inner.parameters(), strict=True)), loss


def test_all_ranks_skip_the_same_step(ranks):
    assert ranks(2).run(spoiled_step) == [(True, math.inf), (True, math.inf)]


EVAL_LENGTHS = [5, 20, 41]


def eval_rows() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, 41), generator=torch.Generator().manual_seed(4))


def validate(rank: int, world: int, mode: str, sp_degree: int) -> dict[str, float]:
    mesh = make_mode_mesh(mode, sp_degree)
    model: Any = tiny_model("llama", torch.float32, use_cache=False)
    apply_seq_parallel_monkey_patch(mode, model, mesh=mesh)
    config: Any = SimpleNamespace(parallel_mode=mode, seq_length=41, eval_every=2, eval_lengths=EVAL_LENGTHS)
    rows = Dataset.from_dict({"input_ids": eval_rows().tolist()}).with_format("torch")
    validation = Validation(config, SimpleNamespace(device="cpu"), mesh, rows)  # type: ignore[arg-type]
    assert validation.run_if_due(model, 3) == {}
    found = validation.run_if_due(model, 4)
    assert model.training
    return found


@pytest.mark.parametrize(
    ("world", "mode", "sp_degree"), [(1, "data_parallel", 1), (4, "zigzag_ring_attn", 2), (2, "data_parallel", 1)]
)
def test_perplexity_by_length_during_training(ranks, world, mode, sp_degree):
    """Three rows over one, two and one data-parallel ranks, against the model's own loss of the rows cut short."""
    model, rows = tiny_model("llama", torch.float32), eval_rows()
    want = {f"perplexity_{n}": math.exp(model(rows[:, :n], labels=rows[:, :n]).loss.item()) for n in EVAL_LENGTHS}
    found = ranks(world).run(validate, mode, sp_degree) if world > 1 else [validate(0, 1, mode, 1)]
    for each in found:
        assert each == pytest.approx(want, rel=1e-5)


def test_perplexity_during_training_is_of_what_would_be_learnt(inputs):
    """Padding and prompts do not count, documents do not see each other; folders with splits give the held-out one."""
    model: Any = tiny_model("llama", torch.float32, use_cache=False)
    first, second = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(6))
    labels = torch.cat([first, second.clone().index_fill(0, torch.arange(9), -100), torch.full((3,), -100)])
    row = {
        "input_ids": [*first.tolist(), *second.tolist(), 0, 0, 0],
        "labels": labels.tolist(),
        "document_ids": [0] * 20 + [1] * 20 + [2] * 3,
    }
    folder = inputs / "split"
    held_out = Dataset.from_dict({name: [value] for name, value in row.items()})
    other = Dataset.from_dict({"input_ids": [[3] * 43] * 2})
    DatasetDict({"train": other, "validation": held_out}).save_to_disk(folder)
    config: Any = SimpleNamespace(
        parallel_mode="data_parallel", seq_length=43, eval_every=1, eval_rows=9, eval_lengths=[2, 20, 43],
        eval_dataset=str(folder), model=str(inputs / "model"), ignore_borders=False, buckets=0, attn_backend="easyctx",
    )  # fmt: skip
    rows = load_eval_rows(config, VOCAB)
    found = Validation(config, SimpleNamespace(device="cpu"), Mesh(), rows).run_if_due(model, 1)  # type: ignore[arg-type]

    with torch.no_grad():
        sum_first = model(first[None], labels=first[None]).loss.item() * 19
        sum_second = model(second[None], labels=labels[None, 20:40]).loss.item() * 11
        beginning = model(first[None, :2], labels=first[None, :2]).loss.item()
    want = {2: beginning, 20: sum_first / 19, 43: (sum_first + sum_second) / 30}
    assert found == pytest.approx({f"perplexity_{n}": math.exp(mean) for n, mean in want.items()}, rel=1e-5)
    rows = rows.map(lambda each: {"labels": each["labels"].index_fill(0, torch.arange(20), -100)}).with_format("torch")
    found = Validation(config, SimpleNamespace(device="cpu"), Mesh(), rows).run_if_due(model, 1)  # type: ignore[arg-type]
    assert found == pytest.approx({"perplexity_43": math.exp(sum_second / 11)}, rel=1e-5)


def test_model_flops_are_causal_and_count_each_once():
    """6 N L + 6 n d L^2, with N as Llama-2-7B's parameters without the embedding."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    length, layers, width, without_embedding = 65536, 32, 4096, 6.607e9
    want = 6 * without_embedding * length + 6 * layers * width * length**2
    assert sequence_flops(model, length) == pytest.approx(want, rel=1e-3)
    model.config.sliding_window, model.config.layer_types = 1024, ["sliding_attention"] * 16 + ["full_attention"] * 16
    windowed = want - 16 * 6 * width * (length**2 - 2 * 1024 * length + 1024**2)
    assert sequence_flops(model, length) == pytest.approx(windowed, rel=1e-3)


def test_a_run_with_everything(inputs, tmp_path, capsys):
    """Held-out perplexity, MFU, a trace; weights in bfloat16 and in shards; a model card that knows the scores."""
    output = tmp_path / "out"
    watch = dict(eval_every=2, eval_dataset=inputs / "data", eval_rows=3, profile="2:1", peak_tflops=1.0)
    weights = dict(save_dtype="bfloat16", max_shard_size="20KB")
    assert train.main(flags(inputs, output, **watch, **weights)) == 0
    assert "perplexity by length after step 2: " in capsys.readouterr().out
    card = json.loads((output / "easyctx_run.json").read_text())
    assert 0 < card["last_step"]["mfu"] < 1
    assert json.loads((output / "profile" / "rank_00000.json").read_text())["traceEvents"]

    assert len(list(output.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (model.dtype, model.config.use_cache) == (torch.bfloat16, True)
    assert model.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(output).encode("cat")

    needle = tmp_path / "out_needle"
    needle.mkdir()
    summary = {"label": "out", "mean": 0.5, "by_length": {"64": {"mean": 0.75}}}
    (needle / "summary.json").write_text(json.dumps(summary))
    write_model_card(output)
    text = (output / "README.md").read_text()
    assert f"trained from `{inputs / 'model'}` for sequences of up to 101 tokens" in text
    assert "| 101 | 100000 | 3 | 18 | 0.01 |" in text
    assert "- out: 50.0% right; 75.0% at 64 (`out_needle`)" in text

    again = tmp_path / "again"
    assert train.main(flags(inputs, again, model=output, max_train_steps=1)) == 0
    stages = json.loads((again / "easyctx_run.json").read_text())["stages"]
    assert [stage["steps"] for stage in stages] == [3, 1]
