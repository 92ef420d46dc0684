"""A needle grid for a fraction of its cost: the same prompts, the same scores, less computed."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyctx.evals import needle, needle_scores, trunk
from easyctx.evals.needle_prompts import NeedlePrompts
from easyctx.evals.needle_settings import Cell, NeedleSettings, check_numbers, number_of
from easyctx.evals.numbers import place_number
from easyctx.evals.scoring import Scorer
from easyctx.evals.session import Session
from easyctx.evals.trunk import TrunkScorer, common_length
from easyctx.generation.calls import Call
from easyctx.generation.model import make_ranks
from easyctx.generation.store import KeyStore
from easyctx.mesh import Mesh
from easyctx.modes import make_mode_mesh
from easyctx.patch import apply_seq_parallel_monkey_patch
from tests.eval_helpers import encoder, english, save_tiny_model
from tests.models import FAMILY_EXTRAS, VOCAB, tiny_model
from tests.pool import RankPool
from tests.test_parity import SHARDED_MODES

CPU = torch.device("cpu")


def prompts_like_a_grid() -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """A trunk; prompts of five lengths with one insertion, one with another, one unlike the trunk almost at once."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, (count,), generator=generator)

    text, needle_ids, other, question = some(120), some(5), some(5), some(9)
    prompts = [torch.cat([text[:31], needle_ids, text[31:]])[: length - 9] for length in (100, 81, 64, 40, 121)]
    prompts.append(torch.cat([text[:70], other]))
    prompts.append(torch.cat([some(1), text[1:50]]))
    prompts = [torch.cat([prompt, question]) for prompt in prompts]
    return text, prompts, [len(prompt) - 4 for prompt in prompts]


def trunk_logits(
    rank: int, world: int, mode: str, family: str, batch_tokens: int = 0
) -> tuple[list[Any], list[Any], int]:
    """Answers' logits by the trunk, by this mode's scorer, and how many tokens the former took."""
    mesh = make_mode_mesh(mode, None, 2 if mode == "usp_attn" else None) if world > 1 else Mesh()
    model = tiny_model(family).eval()
    if world > 1:
        apply_seq_parallel_monkey_patch(mode, model, mesh=mesh)
    text, prompts, starts = prompts_like_a_grid()
    layers = {"layer_by_layer": batch_tokens > 0, "batch_tokens": batch_tokens}
    shared = TrunkScorer(model, make_ranks(mode, mesh, model.config), CPU, chunk=16, **layers)
    shared.follow(text)
    got = shared.answer_logits(prompts, starts)
    scorer = Scorer(model, mode, mesh, CPU)
    alone = [scorer.answer_logits(prompt, start) for prompt, start in zip(prompts, starts, strict=True)]
    return [t.numpy() for t in got], [t.numpy() for t in alone], shared.num_computed


def stock_logits(family: str) -> list[np.ndarray]:
    model = tiny_model(family).eval()
    _, prompts, starts = prompts_like_a_grid()
    with torch.no_grad():
        return [
            model(prompt[None]).logits[0, start - 1 : -1].numpy() for prompt, start in zip(prompts, starts, strict=True)
        ]


def assert_close(got: list[Any], want: list[Any]) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", sorted(FAMILY_EXTRAS))
def test_logits_over_a_trunk_are_those_of_the_stock_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "LONGEST_BRANCH", 40)
    got, alone, computed = trunk_logits(0, 1, "data_parallel", family)
    want = stock_logits(family)
    assert_close(got, want)
    assert_close(alone, want)
    # The trunk as far as it is needed, the longest prompt, and the tokens that are the others' own.
    assert computed < 0.6 * sum(len(prompt) for prompt in prompts_like_a_grid()[1])


@pytest.mark.parametrize("mode", SHARDED_MODES)
def test_logits_over_a_sharded_trunk(mode: str, ranks: Callable[[int], RankPool]) -> None:
    family = "gemma3_text"
    want = stock_logits(family)
    for got, alone, _ in ranks(2).run(trunk_logits, mode, family):
        assert_close(got, want)
        assert_close(alone, want)


def test_three_ranks_and_lengths_that_divide_by_nothing(ranks: Callable[[int], RankPool]) -> None:
    for mode, family in (("striped_attn", "smollm3"), ("zigzag_ring_attn", "gpt_oss")):
        want = stock_logits(family)
        for got, _, _ in ranks(3).run(trunk_logits, mode, family):
            assert_close(got, want)


@pytest.mark.parametrize(("batch_tokens", "of_trunk"), [(1, 31 + 70), (1000, 70)])
def test_layer_by_layer_keeps_the_keys_of_one_layer(
    batch_tokens: int, of_trunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyStore, "put", lambda *_: pytest.fail("keys were kept"))
    monkeypatch.setattr(trunk, "LONGEST_BRANCH", 40)
    got, _, computed = trunk_logits(0, 1, "data_parallel", "gemma3_text", batch_tokens)
    assert_close(got, stock_logits("gemma3_text"))
    # Five prompts of one insertion after 31 tokens, the longest of 121; one of 84 after 70; one of 59 unlike the trunk.
    assert computed == of_trunk + (121 - 1 - 31) + 4 * (9 - 1) + (84 - 1 - 70) + (59 - 1)


def test_layer_by_layer_on_ranks(ranks: Callable[[int], RankPool]) -> None:
    for mode, family, world in (("zigzag_ring_attn", "gpt_oss", 2), ("striped_attn", "smollm3", 3)):
        for got, _, _ in ranks(world).run(trunk_logits, mode, family, 1000):
            assert_close(got, stock_logits(family))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_call_that_fails_beside_others_is_no_deadlock(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, before = Call.attend, set(threading.enumerate())

    def failing(self: Call, number: int, *args: Any) -> torch.Tensor:
        if number == layer and len(self.body_ids) == 60:
            raise ValueError("no")
        return original(self, number, *args)

    monkeypatch.setattr(Call, "attend", failing)
    model = tiny_model("llama").eval()
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config), CPU, layer_by_layer=True)
    text = torch.arange(3, 61).repeat(3)
    scorer.follow(text)
    rest = torch.full((90,), 3)
    for shared, own in ((30, 60), (60, 30)):  # the follower has 60 tokens to compute, then the leader
        prompt = torch.cat([text[:shared], rest[: own + 4]])
        with pytest.raises(ValueError, match="no"):
            scorer.answer_logits([prompt], [len(prompt) - 3])
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if type(thread).__name__ != "TMonitor"]  # tqdm's own, which stays


def test_a_trunk_is_computed_once_and_no_further_than_needed() -> None:
    model = tiny_model("llama").eval()
    text, prompts, starts = prompts_like_a_grid()
    scorer = TrunkScorer(model, make_ranks("data_parallel", None, model.config), CPU, chunk=16)
    scorer.follow(text)
    scorer.answer_logits(prompts[:1], starts[:1])
    assert scorer.num_computed == 32 + (len(prompts[0]) - 31 - 1)
    scorer.follow(text.clone())
    scorer.answer_logits(prompts[:1], starts[:1])
    assert scorer.num_computed == 32 + 2 * (len(prompts[0]) - 31 - 1)
    scorer.follow(text.flip(0))
    scorer.answer_logits(prompts[:1], starts[:1])
    assert scorer.num_computed == 32 + 2 * (len(prompts[0]) - 31 - 1) + len(prompts[0]) - 1


def test_common_length() -> None:
    a = torch.tensor([1, 2, 3, 4])
    assert [common_length(a, torch.tensor(b)) for b in ([1, 2, 3, 4, 5], [1, 2, 9, 4], [2], [1])] == [4, 2, 0, 1]


# Of the prompts before they were run together: they must not change.
OLD_PROMPTS = {(300, 50.0): "531aaaa2bf81ffb6", (6000, 10.0): "3ee40a1a5f0b2ab3"}


@pytest.mark.parametrize("cell", sorted(OLD_PROMPTS))
def test_depth_by_fraction_makes_the_prompts_that_it_made_before(cell: tuple[int, float]) -> None:
    prompts = NeedlePrompts(encoder("bytes"), english(), 6000, NeedleSettings())
    assert prompts.build(Cell(*cell, 0)).hash == OLD_PROMPTS[cell]


@pytest.mark.parametrize("name", ["byte_bpe", "metaspace_bpe", "unigram", "slow"])
@pytest.mark.parametrize("depth_by", ["place", "position"])
def test_needles_at_one_place_are_one_needle(name: str, depth_by: str) -> None:
    settings = NeedleSettings(depth_by=depth_by)
    prompts = NeedlePrompts(encoder(name), english(), 2000, settings)
    # A quarter of 2,000, half of 1,000, or the same fraction of the longest: 500 tokens from the start.
    cells = [Cell(2000, 25.0, 0), Cell(1000, 50.0 if depth_by == "place" else 25.0, 0)]
    longer, shorter = (prompts.build(cell) for cell in cells)
    assert (len(longer.ids), len(shorter.ids)) == (2000, 1000)
    assert longer.answer == shorter.answer
    ids = [torch.from_numpy(prompt.ids) for prompt in (longer, shorter)]
    assert common_length(*ids) > 800
    with_trunk = common_length(ids[0], torch.from_numpy(prompts.trunk(0)))
    assert 450 < with_trunk < 750
    if name != "slow":
        assert abs(with_trunk - longer.needle_start) <= 2
    found = [re.search(r"magic \w+ number is \d{7}\.", prompt.text).group() for prompt in (longer, shorter)]
    assert found[0] == found[1]
    assert prompts.together([*cells, Cell(2000, 50.0, 0)]) == [cells, [Cell(2000, 50.0, 0)]]
    assert prompts.build(Cell(2000, 25.0, 1)).answer != longer.answer


def test_numbers_of_places_differ() -> None:
    lengths = [round(131072 * (i + 1) / 20) for i in range(20)]
    for depth_by in ("place", "position"):
        settings = NeedleSettings(depth_by=depth_by)
        cells = [Cell(length, 10.0 * j, sample) for length in lengths for j in range(11) for sample in range(2)]
        check_numbers(settings, cells)
        numbers = {number_of(settings, cell, lengths[-1]) for cell in cells}
        if depth_by == "position":
            assert len(numbers) == 22
        else:  # 101 different products of 0 to 10 and 1 to 20; lengths are rounded, which parts a place or two
            assert 202 <= len(numbers) <= 206


def test_places_are_told_apart_with_few_digits() -> None:
    cells = [Cell(4000 * 2**i, 5.0 * j, sample) for i in range(2) for j in range(21) for sample in range(8)]
    check_numbers(NeedleSettings(depth_by="place", digits=4), cells)
    numbers = {place_number(1, 4, place, sample) for place in range(100) for sample in range(24)}
    assert len(numbers) == 2400
    with pytest.raises(ValueError, match="would hide the same number"):
        check_numbers(NeedleSettings(depth_by="place", digits=2), cells)


def test_two_depths_of_a_length_are_not_one_place() -> None:
    cells = [Cell(500, depth, 0) for depth in (10.0, 10.2)]
    with pytest.raises(ValueError, match=r"10% and 10.2% of 500 tokens are one place .* --depth-by fraction"):
        check_numbers(NeedleSettings(depth_by="place"), cells)
    check_numbers(NeedleSettings(depth_by="fraction"), cells)


@pytest.mark.parametrize(
    ("flags", "depth_by"),
    [
        (["--lengths", "4000", "8000"], "place"),
        (["--lengths", "3999", "8000"], "fraction"),
        (["--lengths", "4000", "--depths", "1001"], "fraction"),  # four tokens apart
        (["--lengths", "4000", "--needles", "2"], "fraction"),
        (["--lengths", "4000", "--distractors", "1"], "fraction"),
        (["--lengths", "4000", "--depth-by", "fraction"], "fraction"),
        (["--lengths", "400", "--depth-by", "place"], "place"),
    ],
)
def test_the_default_shares_needles_where_that_changes_nothing_else(flags: list[str], depth_by: str) -> None:
    args = needle.make_parser().parse_args([*flags, "--output", "out"])
    assert needle.settings_of(args).depth_by == depth_by


def test_by_place_depths_are_those_by_fraction() -> None:
    """At the shortest length that the default takes, the needle lies within a sentence of where fraction puts it."""
    cells = [Cell(4000, 10.0 * j, 0) for j in range(11)]
    starts = []
    for depth_by in ("place", "fraction"):
        prompts = NeedlePrompts(encoder("byte_bpe"), english(), 4000, NeedleSettings(depth_by=depth_by))
        starts.append([prompts.build(cell).needle_start or 0 for cell in cells])
    assert all(abs(a - b) <= 200 for a, b in zip(*starts, strict=True))
    assert starts[0] == sorted(set(starts[0]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def arguments(model: str, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(english())
    return [
        "--model", model, "--haystack", str(tmp_path / "text.txt"), "--force", "--lengths", "400", "800", "1200",
        "--depths", "0", "33.3", "50", "100", "--prefix", "", "--needle", "[K={number}]", "--question", "\\n",
        "--answer-stub", "[K=",
    ]  # fmt: skip


def rows_of(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    return {(row["length"], row["depth"], row["sample"]): row for row in rows}


@pytest.mark.parametrize(
    ("depth_by", "keys", "num_cells"),
    [("fraction", "layers", 12), ("place", "host", 12), ("position", "auto", 9), ("position", "layers", 9)],
)
def test_a_grid_has_the_rows_that_each_prompt_alone_has(
    depth_by: str, keys: str, num_cells: int, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--depth-by", depth_by]
    assert needle.main([*arguments, "--output", str(tmp_path / "alone"), "--each-prompt-alone"]) == 0
    assert needle.main([*arguments, "--output", str(tmp_path / "grid"), "--verify", "3", "--trunk-keys", keys]) == 0
    assert "verified 3 prompts against running each alone" in capsys.readouterr().out
    alone, grid = rows_of(tmp_path / "alone"), rows_of(tmp_path / "grid")
    assert len(alone) == num_cells
    for cell, row in grid.items():
        assert row["logprob"] == pytest.approx(alone[cell]["logprob"], abs=1e-3)
        for name in ("prompt_hash", "expected", "prediction", "correct", "needle_start"):
            assert row[name] == alone[cell][name]
    found = json.loads((tmp_path / "grid" / "verify.json").read_text())
    assert 0 < found["max_logit_difference"] < 1e-3
    assert all(each["same_predictions"] for each in found["prompts"])
    assert len({each["length"] for each in found["prompts"]}) > 1


def test_verify_sees_a_wrong_trunk(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trunk.common_length
    monkeypatch.setattr(trunk, "common_length", lambda a, b: min(original(a, b) + 20, len(a), len(b)))
    needle.main([*arguments, "--output", str(tmp_path / "out"), "--verify", "2"])
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["max_logit_difference"] > 1e-2


def test_a_killed_grid_by_position_goes_on(arguments: list[str], tmp_path: Path) -> None:
    arguments += ["--depth-by", "position", "--output", str(tmp_path / "out")]
    needle.main(arguments)
    file = tmp_path / "out" / "cells.jsonl"
    before, lines = rows_of(tmp_path / "out"), file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:30])
    assert needle.main(arguments) == 0
    assert file.read_text().splitlines(keepends=True)[:3] == lines[:3]
    assert {cell: row["prompt_hash"] for cell, row in rows_of(tmp_path / "out").items()} == {
        cell: row["prompt_hash"] for cell, row in before.items()
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--depth-by", "place", "--needle", "{city} {number}", "--answer-stub", "{city} ", "--distractors", "2"],
         "--distractors 2 lie at fractions"),
        (["--verify", "-1"], "--verify takes a number"),
        (["--verify", "2", "--each-prompt-alone"], "--verify takes a number"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    flags: list[str], says: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle.main([*arguments, *flags, "--output", str(tmp_path / "out")]) == 2
    assert re.search(f"^error: .*{says}", capsys.readouterr().err, re.MULTILINE)


def test_families_without_a_trunk_run_alone_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    session = Session("data_parallel", Mesh(), CPU, torch.float32)
    assert needle_scores.make_trunk_scorer(session, Scorer(model, "data_parallel", Mesh(), CPU), 100) is None
    assert "every prompt is run alone: the RoPE of this llama" in capsys.readouterr().out


def test_the_benchmark_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import needle_grid

    computed = []
    original = TrunkScorer.answer_logits

    def spy(self: TrunkScorer, *args: Any) -> Any:
        before = self.num_computed
        result = original(self, *args)
        computed.append(self.num_computed - before)
        return result

    monkeypatch.setattr(TrunkScorer, "answer_logits", spy)
    sizes = ["--model", "tiny", "--max-length", "400", "--num-lengths", "4", "--depths", "3", "--samples", "1"]
    needle_grid.main([*sizes, "--depth-by", "place", "--compare", "2", "--output", str(tmp_path)])
    [file] = tmp_path.glob("needle_grid_*.json")
    brute, shared = json.loads(file.read_text())["rows"]
    assert (brute["share_of_brute_force"], brute["timed"]) == (1.0, "12 of 12 forwards")
    assert not shared["extrapolated"]
    assert 0 <= shared["max_logit_difference"] < 1e-5
    assert shared["timed"] == "7 of 7 forwards"  # places 0, 48, 100, 152, 200, 300, 400
    # The FLOPs that are reported count the tokens that are computed.
    flops = needle_grid.Flops(linear=1, attention=0)
    grid = needle_grid.make_grid("place", 400, 4, 3, 1)
    after_brute = computed[2 + 12 :]
    assert after_brute[0] == 400 + 1
    want = sum(flops.group(grid, group) for group in grid.groups())
    assert sum(after_brute[1 : 1 + 7]) == pytest.approx(want, rel=0.05)


def test_the_benchmark_keeps_what_it_measured_before_it_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import needle_grid

    def measure(*_: Any) -> Iterator[list[dict[str, Any]]]:
        yield [{"method": "brute force"}]
        yield [{"method": "brute force"}, {"method": "place"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(needle_grid, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        needle_grid.main(["--model", "tiny", "--output", str(tmp_path)])
    [file] = tmp_path.glob("needle_grid_*.json")
    assert [row["method"] for row in json.loads(file.read_text())["rows"]] == ["brute force", "place"]


def test_the_benchmark_gives_every_method_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every forward takes a second: 100 of them for 3 methods, brute force and all else."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import needle_grid

    now, original = [0.0], TrunkScorer.answer_logits

    def slow(self: TrunkScorer, *args: Any) -> Any:
        now[0] += 1
        return original(self, *args)

    monkeypatch.setattr(needle_grid, "_now", lambda: now[0])
    monkeypatch.setattr(TrunkScorer, "answer_logits", slow)
    sizes = ["--model", "tiny", "--max-length", "400", "--num-lengths", "5", "--depths", "5", "--samples", "4"]
    needle_grid.main([*sizes, "--compare", "3", "--seconds", "100", "--output", str(tmp_path)])
    [file] = tmp_path.glob("needle_grid_*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == ["brute force", "position", "place", "fraction"]
    timed = {row["method"]: int(row["timed"].split()[0]) for row in rows}
    assert rows[0]["timed"] == "20 of 100 forwards"  # a fifth of the time, four of each length
    assert rows[0]["seconds"] == 100
    assert (rows[1]["timed"], rows[1]["extrapolated"]) == ("20 of 20 forwards", False)  # of a third of what is left
    assert timed["place"] >= 15
    assert timed["fraction"] >= 15
    assert rows[2]["extrapolated"]
    assert 90 <= now[0] <= 103
