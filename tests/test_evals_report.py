"""One page of all results, and the evals as a command of the installed package."""

import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from easyctx.cli import main as easyctx
from easyctx.evals import needle_report, perplexity_report
from easyctx.evals import report as page
from easyctx.evals.command import EVALS
from easyctx.evals.results import append_rows, open_output
from easyctx.evals.tasks import longchat, ruler
from easyctx.evals.tasks.report import report as report_scores
from easyctx.evals.tasks.ruler_tasks import TASKS


class Tables(HTMLParser):
    """The cells of each table, and what the page would have to load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def needle_results(folder: Path, label: str, right: int) -> None:
    settings = {"eval": "needle", "digits": 7, "distractors": 0, "depth_by": "fraction", "models": {label: []}}
    open_output(folder, settings, (), overwrite=False)
    row = {"sample": 0, "token_accuracy": 1.0, "logprob": -1.0, "seconds": 1.0}
    rows = [{"length": 1000 * (i + 1), "depth": 0.0, "correct": i < right, **row} for i in range(4)]
    append_rows(folder / "cells.jsonl", rows)
    needle_report.report(folder, label, {"torch": "2.13"}, None)


def perplexity_results(folder: Path) -> None:
    settings = {"eval": "perplexity", "stride": None, "models": {"a<b>": [], "c": []}}
    open_output(folder, settings, (), overwrite=False)
    row = {"document": "d", "lengths": [64], "reached": [64], "nll_sum": [63.0], "num_scored": [63], "seconds": 1.0}
    bins = {"bin_edges": [0, 63], "bin_nll_sum": [63.0]}
    append_rows(folder / "documents.jsonl", [{"model": label, **row, **bins} for label in ("a<b>", "c")])
    perplexity_report.report(folder, {}, None)


def score_rows(kind: str, column: str, label: str) -> list[dict[str, Any]]:
    row = {"model": label, "kind": kind, "references": ["x"], "prediction": ""}
    return [{**row, "item": f"{kind}/{n}", column: n, "score": score} for n, score in ((4096, 1.0), (8192, 0.0))]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    needle_results(tmp_path / "needle" / "a", "a<b>", right=3)
    needle_results(tmp_path / "needle" / "c", "c", right=1)
    perplexity_results(tmp_path / "perplexity")
    for name in ("lines", "ruler"):
        (tmp_path / name).mkdir()
    rows = score_rows("lines", "num_lines", "c")
    report_scores(rows, longchat.view({"task": "lines"}), tmp_path / "lines", {"task": "lines"}, {})
    rows = [row for task in TASKS for row in score_rows(task, "length", "c")]
    report_scores(rows, ruler.view_of({}, 85.6), tmp_path / "ruler", {}, {})
    return tmp_path


@pytest.mark.parametrize("name", EVALS)
def test_help_begins_with_what_was_typed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module = importlib.import_module(EVALS[name][0])
    started = {
        "/usr/bin/easyctx": f"easyctx eval {name}",
        "/somewhere/easyctx/__main__.py": f"easyctx eval {name}",
        f"eval/{name}.py": f"{name}.py",
        module.__file__: f"python -m {EVALS[name][0]}",
    }
    for script, prog in started.items():
        monkeypatch.setattr(sys, "argv", [script])
        with pytest.raises(SystemExit):
            module.main(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {prog} ")


def test_a_page_holds_every_result_and_needs_nothing_else(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = results / "new" / "report.html"
    assert easyctx(["eval", "report", str(results), str(results / "needle" / "a"), "--output", str(file)]) == 0
    assert "report on 5 results" in capsys.readouterr().out
    parsed = Tables(file.read_text(encoding="utf-8"))
    overview = {row[0]: row for row in parsed.tables[0]}
    titles = ["LongChat lines", "Needle in a haystack", "Perplexity", "RULER"]
    assert overview["model"][1:] == titles
    assert overview["a<b>"][1:] == ["", "0.750 (0.301 to 0.954)", "2.718 at 64", ""]
    assert overview["c"][1:3] == ["0.500 (0.095 to 0.905)", "0.250 (0.046 to 0.699)"]
    assert overview["c"][4] == "effective length 4K (at least 85.6)"
    [ruler_table] = [table for table in parsed.tables if table[1][0] == "niah_single_1"]
    assert ruler_table[0] == ["c", "4K", "8K"]
    assert ruler_table[-2] == ["average", "1.000", "0.000"]
    assert len(parsed.links) == 6
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in parsed.links)


def test_two_results_of_one_model_are_two_columns(tmp_path: Path) -> None:
    for name in ("one", "two"):
        needle_results(tmp_path / name, "c", right=2)
    file = tmp_path / "report.html"
    assert page.main([str(tmp_path), "--output", str(file)]) == 0
    header = Tables(file.read_text()).tables[0][0]
    assert len(header) == 3
    assert header[2].startswith("Needle in a haystack (")


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        (None, [], "holds no summary.json"),
        ("{", [], "is not what an eval of easyctx writes"),
        (json.dumps({"settings": {"eval": "needle"}}), [], "is not what an eval of easyctx writes"),
        (json.dumps({"eval": "vision", "settings": {}}), [], "results of 'vision'"),
        ("{}", ["--output", "{tmp}"], "is a folder"),
    ],
)
def test_mistakes_are_one_line(
    content: str | None, flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "summary.json").write_text(content)
    flags = [flag.format(tmp=tmp_path) for flag in flags] or ["--output", str(tmp_path / "x.html")]
    assert page.main([str(tmp_path), *flags]) == 2
    assert re.search(f"^error: .*{says}", capsys.readouterr().err)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("name", EVALS)
def test_each_eval_is_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        easyctx(["eval", name, "--help"])
    assert exit_info.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_a_commands_own_flags_and_mistakes_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    assert easyctx(["eval", "needle", "--output", "x", "--lengths", "1000"]) == 2
    assert "error: --model and --haystack are needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        easyctx(["eval", "nothing"])
    assert "choose from 'needle'" in capsys.readouterr().err
