"""Questions and answers in the forms of FastChat (Vicuna and MT-bench), and battles in LMSYS's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyctx.evals.tasks.predictions import field_of, read_records
from easyctx.evals.tournament.ratings import Battle

QUESTION_FIELDS = ("text", "turns", "question", "prompt")
ANSWER_FIELDS = ("text", "choices", "answer", "prediction", "output")
WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


def read_questions(file: Path) -> dict[str, str]:
    """Text by id. Of several turns, the first."""
    questions: dict[str, str] = {}
    for place, row in read_records(file):
        questions[_id(row, place)] = _text(field_of(row, QUESTION_FIELDS, place), place)
    if not questions:
        raise ValueError(f"{file} holds no question")
    return questions


def read_answers(files: list[Path], labels: list[str] | None) -> dict[str, dict[str, str]]:
    """By model, its answer by question id. A model is named by its label, by `model_id`, or by its file."""
    if labels is not None and len(labels) != len(files):
        raise ValueError(f"--labels names {len(labels)} models, --answers {len(files)} files")
    answers: dict[str, dict[str, str]] = {}
    for number, file in enumerate(files):
        found: dict[str, str] = {}
        label = labels[number] if labels else None
        for place, row in read_records(file):
            label = label or str(row.get("model_id") or file.name.split(".")[0])
            found[_id(row, place)] = _text(field_of(row, ANSWER_FIELDS, place), place)
        if label is None or not found:
            raise ValueError(f"{file} holds no answer")
        if label in answers:
            raise ValueError(f"two files of --answers are of {label!r}; tell them apart with --labels")
        answers[label] = found
    if len(answers) < 2:
        raise ValueError(f"--answers has {len(answers)} model; a tournament takes 2 or more")
    return answers


def answered_by_all(questions: dict[str, str], answers: dict[str, dict[str, str]]) -> list[str]:
    """The questions that each model has answered. Raises ValueError where there are none."""
    common = [name for name in questions if all(name in given for given in answers.values())]
    if not common:
        counts = ", ".join(f"{label} {len(given.keys() & questions.keys())}" for label, given in answers.items())
        raise ValueError(f"no question is answered by all models; of {len(questions)} questions: {counts}")
    return common


def read_battles(files: list[Path]) -> tuple[list[Battle], int]:
    """Battles from our verdicts.jsonl or rows of `model_a`, `model_b`, `winner`; and how many have no verdict."""
    battles, failed = [], 0
    for file in files:
        for place, row in read_records(file):
            if "scores" in row:
                if row["scores"] is None:
                    failed += 1
                else:
                    battles.append(_checked_battle(row, place))
                continue
            first, second, winner = (str(field_of(row, (name,), place)) for name in ("model_a", "model_b", "winner"))
            if winner not in WINNERS:
                raise ValueError(f"{place}: the winner is {winner!r}, none of {', '.join(WINNERS)}")
            battles.append(Battle(first, second, WINNERS[winner]))
    if not battles:
        raise ValueError("--score-only: the files hold no battle with a verdict")
    return battles, failed


def _checked_battle(row: dict[str, Any], place: str) -> Battle:
    for name in ("first", "second", "question"):
        field_of(row, (name,), place)
    scores = row["scores"]
    if not isinstance(scores, list) or len(scores) != 2 or not all(isinstance(each, int | float) for each in scores):
        raise ValueError(f"{place}: scores are {scores!r}, not two numbers")
    return battle_of(row)


def battle_of(row: dict[str, Any]) -> Battle:
    """A verdict with two scores as a battle: the higher wins, equal ones tie."""
    one, two = row["scores"]
    return Battle(row["first"], row["second"], 0.5 if one == two else float(one > two), row["question"])


def _id(row: dict[str, Any], place: str) -> str:
    return str(field_of(row, ("question_id", "id"), place))


def _text(value: Any, place: str) -> str:
    """A text, the first of several turns, or those of the first choice."""
    while isinstance(value, list | dict) and value:
        value = value[0] if isinstance(value, list) else value.get("turns")
    if not isinstance(value, str):
        raise ValueError(f"{place}: there is no text where one is expected")
    return value
