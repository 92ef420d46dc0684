"""Elo: tournaments before judges over http and local ones, resume, refusals."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from easyctx.evals import elo, report
from easyctx.evals.tournament import judge as judging
from tests.eval_helpers import save_tiny_model
from tests.task_helpers import FakeGenerator, summary_of, write_jsonl

Reply = Callable[[dict[str, Any]], tuple[int, str]]


class Endpoint:
    """An OpenAI-compatible server of this process; `reply(request body)` gives status and the message's text."""

    def __init__(self) -> None:
        self.reply: Reply = better_answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append({**body, "path": self.path})
                endpoint.headers.append(self.headers.get("Authorization"))
                status, text = endpoint.reply(body)
                data = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text})
                self.send_response(status)
                self.send_header("Content-Length", str(len(data.encode())))
                self.end_headers()
                self.wfile.write(data.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def better_answer(body: dict[str, Any]) -> tuple[int, str]:
    """Longer answers get more points."""
    first, second = re.findall(r"\[Answer of assistant \d\]\n(.*)\n", body["messages"][1]["content"])
    return 200, f"{min(len(first), 10)} {min(len(second), 10)}\nBecause."


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    served = Endpoint()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    questions = [{"question_id": i, "text": f"Question {i}?"} for i in range(6)]
    write_jsonl(tmp_path / "questions.jsonl", questions)
    for name, text in (("good", "x" * 9), ("fair", "x" * 5), ("poor", "x")):
        rows = [{"question_id": i, "text": text} for i in range(5 if name == "poor" else 6)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("fair", "poor", "good")]
    flags = ["--questions", str(tmp_path / "questions.jsonl"), "--answers", *files, "--rounds", "24"]
    return [*flags, "--output", str(tmp_path / "out")]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging.time, "sleep", lambda seconds: None)


def verdicts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("figures")
def test_a_tournament_over_http(arguments: list[str], endpoint: Endpoint, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    flags = [*arguments, "--judge-url", endpoint.url, "--judge-model", "m"]
    assert elo.main(flags) == 0
    summary = summary_of(tmp_path / "out")
    board = summary["leaderboard"]
    assert [entry["model"] for entry in board] == ["good", "fair", "poor"]
    assert [entry["won"] for entry in board] == [16, 8, 0]
    assert all(entry["elo_interval"][0] <= entry["elo"] <= entry["elo_interval"][1] for entry in board)
    assert sum(entry["elo"] for entry in board) == pytest.approx(3000)
    assert (summary["num_battles"], summary["num_failed"]) == (24, 0)
    assert endpoint.requests[0]["model"] == "m"
    assert endpoint.requests[0]["path"] == "/v1/chat/completions"
    assert set(endpoint.headers) == {"Bearer secret"}
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json*"))
    assert not any("Question 5?" in str(request) for request in endpoint.requests)  # one model lacks it
    assert (tmp_path / "out" / "elo.png").stat().st_size > 1000
    assert report.main([str(tmp_path / "out"), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert f"<tr><td>good</td><td>{board[0]['elo']:.1f}</td>" in page
    assert "<td>16</td><td>0</td><td>0</td></tr>" in page
    asked = len(endpoint.requests)
    assert elo.main(flags) == 0
    assert elo.main(["--plot-only", "--output", str(tmp_path / "out")]) == 0
    assert len(endpoint.requests) == asked == 24
    assert summary_of(tmp_path / "out")["leaderboard"] == board
    assert elo.main([*flags, "--rounds", "30"]) == 0
    assert len(endpoint.requests) == 30
    battles = str(tmp_path / "out" / "verdicts.jsonl")
    assert elo.main(["--score-only", battles, "--output", str(tmp_path / "again")]) == 0
    assert summary_of(tmp_path / "again")["leaderboard"] == summary_of(tmp_path / "out")["leaderboard"]


def test_rounds_that_come_again_and_other_ratings_are_those_of_the_run_in_a_later_report(
    arguments: list[str], endpoint: Endpoint, tmp_path: Path
) -> None:
    flags = ["--judge-url", endpoint.url, "--judge-model", "m", "--k", "8", "--start", "1500", "--seed", "1"]
    assert elo.main([*arguments, *flags, "--rounds", "70"]) == 0
    assert len(endpoint.requests) == 30  # 3 pairs, 5 questions, both orders
    summary = summary_of(tmp_path / "out")
    assert summary["num_battles"] == 70
    assert elo.main(["--plot-only", "--output", str(tmp_path / "out")]) == 0
    assert summary_of(tmp_path / "out") == summary
    assert elo.main(["--plot-only", "--output", str(tmp_path / "out"), "--k", "32"]) == 0
    assert summary_of(tmp_path / "out")["rating"] == {"k": 32, "start": 1500, "seed": 1}


def test_nonsense_is_asked_for_again_counted_and_never_scored(
    arguments: list[str], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, str]:
        text = body["messages"][1]["content"]
        if "Question 0?" in text:
            return 200, "I cannot say."
        if "Question 1?" in text and "two scores alone" not in text.rsplit("reasons", 1)[1]:
            return 200, "8 of 10, 9 of 10"
        return better_answer(body)

    endpoint.reply = reply
    assert elo.main([*arguments, "--rounds", "30", "--judge-url", endpoint.url, "--judge-model", "m"]) == 0
    rows = verdicts_of(tmp_path / "out")
    assert {(row["scores"] is None, row["num_tries"]) for row in rows if row["question"] == "0"} == {(True, 3)}
    assert {(row["scores"] is None, row["num_tries"]) for row in rows if row["question"] == "1"} == {(False, 2)}
    summary = summary_of(tmp_path / "out")
    assert (summary["num_battles"], summary["num_failed"]) == (24, 6)
    assert sum(entry[name] for entry in summary["leaderboard"] for name in ("won", "tied", "lost")) == 48
    assert "24 battles; 6 without a verdict" in capsys.readouterr().out


def test_a_judge_that_is_down_for_a_while_is_waited_for(
    arguments: list[str], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([(503, "busy"), (429, "slow down")])
    endpoint.reply = lambda body: next(answers, None) or better_answer(body)
    assert elo.main([*arguments, "--judge-url", endpoint.url, "--judge-model", "m"]) == 0
    assert len(endpoint.requests) == 26
    assert "429 Too Many Requests; trying again in 2 s" in capsys.readouterr().out


def test_a_judge_that_stays_down_is_an_error_and_what_it_judged_is_kept(
    arguments: list[str], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda body: better_answer(body) if len(endpoint.requests) <= 5 else (500, "broken")
    flags = [*arguments, "--judge-url", endpoint.url, "--judge-model", "m"]
    assert elo.main(flags) == 2
    assert re.search("^error: the judge .* did not answer in 6 tries: 500 .* is kept", capsys.readouterr().err, re.M)
    assert len(verdicts_of(tmp_path / "out")) == 5
    endpoint.reply = better_answer
    assert elo.main(flags) == 0
    assert len(endpoint.requests) == 5 + 6 + 19


def test_a_local_judge(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(prompt: str) -> str:
        return better_answer({"messages": [{}, {"content": prompt}]})[1]

    monkeypatch.setattr(elo, "load_generator", lambda session, model, config, tokens: FakeGenerator(tokens, reply))
    model = str(save_tiny_model(tmp_path / "judge"))
    assert elo.main([*arguments, "--judge", model, "--parallel_mode", "auto"]) == 0
    assert [entry["model"] for entry in summary_of(tmp_path / "out")["leaderboard"]] == ["good", "fair", "poor"]


def test_a_models_own_verdicts_cannot_be_read(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model with random weights, through the real generator, is never scored."""
    model = str(save_tiny_model(tmp_path / "judge"))
    assert elo.main([*arguments, "--judge", model, "--rounds", "2", "--tries", "1"]) == 2
    assert "error: none of 2 verdicts of the judge could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give one judge"),
        (["--judge-url", "http://x", "--judge", "y"], "give one judge"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "needs --judge-model"),
        (["--judge-url", "localhost:8000", "--judge-model", "m"], "give an address such as http"),
        (["--judge", "./nowhere"], "no folder here"),
        (["--rounds", "0", "--judge", "x"], "--rounds is 0"),
        (["--answers", "{tmp}/good.jsonl", "--judge", "x"], "has 1 model; a tournament takes 2"),
        (["--answers", "{tmp}/good.jsonl", "{tmp}/other.jsonl", "--judge", "x"], "no question is answered by all"),
        (["--questions", "{tmp}/none.jsonl", "--judge", "x"], "none.jsonl is no file"),
    ],
)
def test_mistakes_are_one_line_before_a_judge_is_asked(
    flags: list[str], says: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "other.jsonl", [{"question_id": "z", "text": "x"}])
    assert elo.main([*arguments, *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    assert re.search(f"^error: .*{says}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_refuses_is_not_asked_again(
    arguments: list[str], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.reply = lambda body: (401, "no such key")
    assert elo.main([*arguments, "--judge-url", endpoint.url, "--judge-model", "m"]) == 2
    assert re.search("^error: the judge .* refuses: 401 .*no such key", capsys.readouterr().err, re.M)
    assert len(endpoint.requests) == 1
