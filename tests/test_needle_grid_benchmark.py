"""The needle grid's benchmark: what it counts as computed, keeps when cut off, and spends its time on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from easyctx.evals.trunk import TrunkScorer


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
