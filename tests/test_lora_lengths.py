"""benchmarks/lora_lengths.py on a CPU: its steps' rows, what it counts and compares, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch

TINY = "--model tiny --layers 2 --shortest 40 --longest 200 --answer 8 --steps 6 --lora-r 4"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


def run(monkeypatch, flags: str) -> None:
    import lora_lengths

    monkeypatch.setattr(sys, "argv", ["lora_lengths.py", *flags.split()])
    lora_lengths.main()


def test_a_run_on_rows_of_unequal_lengths_and_the_tokens_behind_a_prompt(monkeypatch, tmp_path):
    run(monkeypatch, f"{TINY} --new-tokens 2 --output {tmp_path}")
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    steps, (of_all, cached, again, compared) = rows[:6], rows[6:]
    lengths = [row["tokens"] for row in steps]
    assert lengths[2:4] == lengths[4:] == [41, 199]
    assert [row["visit"] for row in steps] == [1, 1, 1, 1, 2, 2]
    assert all(row["padded_to"] >= row["tokens"] and row["tokens"] % 2 for row in steps)
    assert len({row["padded_to"] for row in steps}) == 4
    assert all(row["grad_norm"] > 0 for row in steps)
    assert list(of_all["seconds_by_visit"]) == ["41", "199"]
    assert (cached["kv_cache"], again["kv_cache"]) == (True, False)
    assert cached["token_ids"] == again["token_ids"]
    assert compared["same_tokens"] == compared["of_tokens"] == 2
    assert 0 <= compared["largest_logit_difference"] < 1e-5 < compared["largest_logit"]


def test_rows_come_in_the_order_that_was_asked_for():
    from lora_lengths import lengths_of_steps, make_rows

    from easyctx.training.order import GlobalOrder

    lengths = lengths_of_steps(40, 200, 10)
    rows, order = make_rows(lengths, 8, 100, seed=3), GlobalOrder(10, 3, 1, 0, 1)
    assert [len(rows[order.row(sample)]["input_ids"]) for sample in range(10)] == lengths
    assert all([label for label in row["labels"] if label != -100] == row["input_ids"][-8:] for row in rows)


def test_logits_are_compared_up_to_the_first_other_token():
    from lora_lengths import difference

    logits = torch.tensor([[1.0, 2.0], [3.0, 3.0], [5.0, 0.0]])
    others = torch.tensor([[1.0, 2.5], [3.0, 4.0], [-9.0, 0.0]])
    found = difference(([1, 0, 0], logits), ([1, 1, 1], others))
    assert (found["same_tokens"], found["largest_logit_difference"]) == (1, 1.0)


def test_kernels_are_counted_that_flash_attention_4_keeps(monkeypatch):
    from types import ModuleType

    from step_parts.compiled import Compiled

    interface, counted = ModuleType("interface"), Compiled()
    before = counted.now()["flash_attn_4"]
    interface.forward = lambda: None
    interface.forward.compile_cache = {"a": 1, "b": 2}
    interface.same = interface.forward
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    assert counted.now()["flash_attn_4"] - before == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--answer 40", "--shortest 40"),
        ("--steps 5", "--steps is 5: give at least 6"),
        ("--gradient-accumulate-every 2", "a step is one row"),
        ("--parallel_mode zigzag_ring_attn", "zigzag_ring_attn shares one sequence"),
        ("--lora-r 0", "--lora-r is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_made(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, f"{TINY} {flags}")
    assert message in capsys.readouterr().err
