"""A generator without a model, for the evals of generated answers: it reads the prompt and answers by a function."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from easyctx.evals.session import Session
from easyctx.evals.tasks import longchat, runner
from easyctx.mesh import make_mesh


@dataclass(frozen=True)
class FakeAnswer:
    text: str
    token_ids: tuple[int, ...] = ()
    stopped_by: str = "length"


class FakeGenerator:
    """Answers `reply(prompt text)`, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, reply: Callable[[str], str]):
        self.tokenizer, self.reply = tokenizer, reply
        self.calls: list[dict[str, Any]] = []

    def answer(
        self, context_ids: Sequence[int], questions: Sequence[Sequence[int]] = ((),), **settings: Any
    ) -> list[FakeAnswer]:
        self.calls.append({"context": len(context_ids), "questions": len(questions), **settings})
        prompts = [self.tokenizer.decode([*context_ids, *rest]) for rest in questions]
        return [FakeAnswer(self.reply(prompt)) for prompt in prompts]


class Generators(list[FakeGenerator]):
    """Those that a test's runs have loaded; `reply` is what the next ones answer."""

    def __init__(self) -> None:
        super().__init__()
        self.reply: Callable[[str], str] = lambda prompt: ""


def fake_generators(monkeypatch: pytest.MonkeyPatch) -> Generators:
    """Evals load fakes from now on; the list of those that they loaded."""
    loaded = Generators()

    def load(session: Any, model: str, config: Any, tokenizer: Any, **_: Any) -> FakeGenerator:
        loaded.append(FakeGenerator(tokenizer, lambda prompt: loaded.reply(prompt)))
        return loaded[-1]

    monkeypatch.setattr(runner, "load_generator", load)
    return loaded


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_longchat_on_ranks(rank: int, world: int, mode: str, sp_degree: int, arguments: list[str]) -> None:
    """The longchat eval without a launcher."""
    args = longchat.make_parser().parse_args(arguments)
    session = Session(mode, make_mesh(sp_degree), torch.device("cpu"), torch.float32, force=True)
    runner.run_models(session, args, ["tiny"], longchat.prepare(args), longchat.view)
