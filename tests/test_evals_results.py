"""Results that survive: rows, settings, intervals, grids, pictures."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from easyctx.evals import needle
from easyctx.evals.grid import depths_of, lengths_of
from easyctx.evals.needle_report import axis_labels
from easyctx.evals.plots import heatmaps, length_labels, needle_panel, perplexity_curves
from easyctx.evals.results import append_rows, open_output, read_rows, read_settings, write_json, write_text
from easyctx.evals.session import Session, run_main
from easyctx.evals.session import start as session_start
from easyctx.evals.stats import average_interval, bootstrap_ratio, perplexity, wilson_interval
from easyctx.evals.textio import read_haystack, read_jsonl
from easyctx.mesh import Mesh


def settings(**changes: Any) -> dict[str, Any]:
    return {"eval": "needle", "seed": 1, "models": {"a": ["path", [["model.safetensors", 5, 7]]]}} | changes


def test_rows_of_a_killed_run_are_read_and_the_half_line_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_rows(file, [{"k": 1, "v": "a\u2028b"}, {"k": 2, "v": 1}])
    append_rows(file, [{"k": 1, "v": "new"}])
    with file.open("a") as stream:
        stream.write('{"k": 3, "v": ')
    before = file.read_bytes()
    assert read_rows(file, ("k",)) == [{"k": 1, "v": "new"}, {"k": 2, "v": 1}]
    assert file.read_bytes() == before  # it may be another run that is just writing the line
    append_rows(file, [{"k": 4, "v": 0}])
    assert [row["k"] for row in read_rows(file, ("k",))] == [1, 2, 4]
    assert read_rows(tmp_path / "none.jsonl", ("k",)) == []


@pytest.mark.parametrize("line", ["{", '{"v": 1}', "[1]", "1"])
def test_a_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"k": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl line 2 is no row .*--overwrite"):
        read_rows(tmp_path / "rows.jsonl", ("k",))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    session = Session("data_parallel", Mesh(), torch.device("cpu"), torch.float32)
    output = tmp_path / "file" / "out"

    def run(args: argparse.Namespace) -> None:
        session.on_main(lambda: open_output(output, settings(), (), overwrite=False))

    assert run_main(run, argparse.Namespace()) == 2
    assert re.search(f"^error: .*{output}", capsys.readouterr().err)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"mean": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(file, {"mean": math.nan})
    assert json.loads(file.read_text()) == {"mean": 1}
    write_text(file, "x")
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_other_settings_are_refused_by_name_and_value(tmp_path: Path) -> None:
    open_output(tmp_path, settings(), ("rows.jsonl",), overwrite=False)
    open_output(tmp_path, settings(), ("rows.jsonl",), overwrite=False)
    with pytest.raises(ValueError, match=r"seed \(1 before, 2 now\).*--overwrite"):
        open_output(tmp_path, settings(seed=2), ("rows.jsonl",), overwrite=False)
    with pytest.raises(ValueError, match="the weights of model a"):
        open_output(tmp_path, settings(models={"a": ["path", []]}), ("rows.jsonl",), overwrite=False)
    open_output(tmp_path, settings(models={"b": ["other", []]}), ("rows.jsonl",), overwrite=False)
    assert set(read_settings(tmp_path)["models"]) == {"a", "b"}


def test_overwrite_removes_only_the_evals_own_files(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "thesis.txt"):
        (tmp_path / name).write_text("x")
    open_output(tmp_path, settings(), ("rows.jsonl",), overwrite=False)
    open_output(tmp_path, settings(seed=2), ("rows.jsonl",), overwrite=True)
    assert not (tmp_path / "rows.jsonl").exists()
    assert (tmp_path / "thesis.txt").exists()
    assert read_settings(tmp_path)["seed"] == 2


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        open_output(tmp_path / "file", settings(), (), overwrite=False)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),  # R: prop.test(right, of, correct = FALSE)
    [(8, 10, 0.4901625, 0.9433178), (10, 10, 0.7224672, 1.0), (0, 5, 0.0, 0.4344825), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(right: int, of: int, low: float, high: float) -> None:
    assert wilson_interval(right, of) == pytest.approx((low, high), abs=1e-6)


def test_an_average_of_kinds_is_never_certain() -> None:
    for groups in ([[1.0] * 2, [1.0] * 3], [[1.0] * 3, [1.0] * 2]):  # kinds that are not equally large
        assert average_interval(groups) == wilson_interval(5, 5)
    assert average_interval([[0.0, 1.0], [1.0, 1.0]]) == wilson_interval(3, 4)
    low, high = average_interval([[0.0, 1.0] * 50, [1.0] * 50]) or (0, 0)
    assert 0.69 < low < 0.72  # 0.75 -+ 1.96 * 0.5 * sqrt(0.25 / 100)
    assert 0.78 < high < 0.81
    assert average_interval([[0.5], [1.0]]) is None


def test_bootstrap_is_over_documents() -> None:
    low, high = bootstrap_ratio([10.0, 20.0, 30.0], [10, 10, 10]) or (0, 0)
    assert 1.0 <= low < 2.0 < high <= 3.0
    assert bootstrap_ratio([5.0, 5.0, 5.0], [10, 10, 10]) == (0.5, 0.5)
    assert bootstrap_ratio([5.0], [10]) is None


def test_perplexity_past_the_largest_float_is_none() -> None:
    assert perplexity(math.log(5)) == pytest.approx(5)
    assert perplexity(1e5) is None


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (["3"], [0, 50, 100]),
        (["0", "33.33", "100%"], [0, 33.3, 100]),
        (["50%"], [50]),
        (["7"], [0, 16.7, 33.3, 50, 66.7, 83.3, 100]),
    ],
)
def test_depths(values: list[str], want: list[float]) -> None:
    assert depths_of(values) == want


@pytest.mark.parametrize("values", [["0", "101"], ["-1", "5"], ["half", "whole"], ["1"], ["150%"]])
def test_wrong_depths(values: list[str]) -> None:
    with pytest.raises(ValueError, match="--depths"):
        depths_of(values)


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], needle.LENGTHS),
        (["--lengths", "300", "100", "300"], [100, 300]),
        (["--min-length", "100", "--max-length", "400", "--num-lengths", "4"], [100, 200, 300, 400]),
        (["--min-length", "50", "--max-length", "50", "--num-lengths", "1"], [50]),
    ],
)
def test_lengths(flags: list[str], want: list[int]) -> None:
    assert lengths_of(needle.make_parser().parse_args(["--output", "x", *flags])) == want


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lengths", "1"], "at least 2"),
        (["--lengths", "100", "--num-lengths", "3"], "not both"),
        (["--min-length", "100", "--num-lengths", "3"], "go together"),
        (["--min-length", "500", "--max-length", "400", "--num-lengths", "4"], "500, but --max-length only 400"),
        (["--min-length", "100", "--max-length", "400", "--num-lengths", "1"], "at least 2"),
    ],
)
def test_wrong_lengths(flags: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lengths_of(needle.make_parser().parse_args(["--output", "x", *flags]))


@pytest.mark.parametrize(
    ("flags", "longest"),
    [
        (["--min-length", "1000", "--max-length", "500000", "--num-lengths", "3"], 500_000),
        (["--lengths", "9", "7"], 9),
        ([], needle.LENGTHS[-1]),
    ],
)
def test_auto_takes_the_mode_for_the_longest_prompt(
    flags: list[str], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def resolve(*args: Any, forward_only: bool) -> tuple[str, None]:
        asked.append(args[:2])
        return "data_parallel", None

    monkeypatch.setattr("easyctx.cost.choose.resolve_mode", resolve)
    args = needle.make_parser().parse_args(["--model", "m", "--output", "x", "--parallel_mode", "auto", *flags])
    session_start(args)
    assert asked == [("m", longest)]
    assert args.parallel_mode == "data_parallel"


def test_a_cell_is_of_so_many_prompts_where_that_is_the_same_in_all_panels() -> None:
    two, four = [{"sample": 0}, {"sample": 1}], [{"sample": 3}]
    assert axis_labels(two, two)["scale"] == "answered right (of 2)"
    assert axis_labels(two, four)["scale"] == axis_labels([{"sample": 0}])["scale"] == "answered right"


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [
        ((256, 1000, 1024, 65536, 1_500_000), ["256", "1K", "1024", "65.5K", "1.5M"]),
        ((256, 1000, 1024, 65536, 131_072, 1_572_864), ["256", "1000", "1K", "64K", "128K", "1.5M"]),
        ((100_000, 131_072), ["100K", "131K"]),
        ((128_000, 256_000, 1_024_000), ["128K", "256K", "1.02M"]),  # multiples of 1,024 as well
        ((128_000, 131_072), ["125K", "128K"]),
        ((100, 200, 300), ["100", "200", "300"]),
        ((), []),
    ],
)
def test_lengths_that_are_shown_together_have_one_kind_of_thousand(lengths: tuple[int, ...], labels: list[str]) -> None:
    assert length_labels(lengths) == dict(zip(lengths, labels, strict=True))


@pytest.mark.usefixtures("figures")
def test_heatmap_has_a_fixed_scale_and_grey_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    shares = {(1000, 0.0): 0.9, (2000, 0.0): 0.95, (1000, 100.0): 1.0}
    panel = needle_panel(shares, "mean 0.95")
    heatmaps(tmp_path / "needle.png", [panel], title="title", **axis_labels([{"sample": 1}]))
    image = kept[0].axes[0].images[0]
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "RdYlGn"
    assert image.get_array().mask.tolist() == [[False, False], [False, True]]
    assert [label.get_text() for label in kept[0].axes[0].get_xticklabels()] == ["1K", "2K"]
    assert [label.get_text() for label in kept[0].axes[0].get_yticklabels()] == ["0%", "100%"]
    assert (tmp_path / "needle.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("figures")
def test_curves_of_several_models_share_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    point = {"low": None, "high": None}
    curves = {
        "before": [{"length": 256, "perplexity": 5.0, **point}, {"length": 512, "perplexity": None, **point}],
        "after": [{"length": 256, "perplexity": 5.0, **point}, {"length": 512, "perplexity": 90.0, **point}],
    }
    perplexity_curves(tmp_path / "perplexity.png", curves, "title", "2 documents")
    axes = kept[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["before", "after"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[256], [256, 512]]
    assert axes.get_yscale() == "log"


def test_haystacks_are_joined_in_sorted_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "B\n"), ("a.txt", "\nA"), ("c.md", "not read")):
        (tmp_path / name).write_text(text)
    assert read_haystack(tmp_path) == "A\n\nB"
    assert read_haystack(tmp_path / "b.txt") == "B"


@pytest.mark.parametrize(
    ("files", "says"),
    [({}, "holds no file"), ({"a.txt": b" \n"}, "only empty text"), ({"a.txt": b"\xff\xfe"}, "not UTF-8"),
     ({"a.txt.gz": b"text"}, "not a whole gzip")],
)  # fmt: skip
def test_wrong_haystacks(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_haystack(tmp_path)


def test_a_broken_json_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x\u2028y"}\n\n[1]\n')
    rows = read_jsonl(file)
    assert next(rows) == (1, {"text": "x\u2028y"})
    with pytest.raises(ValueError, match="line 3 is a list"):
        next(rows)
