"""LongChat's two retrieval tasks as prompts: topics of conversations, and lines with registers.

After LongChat (Li et al., "How long can open-source LLMs truly promise on context length?", 2023). The
wording is our own; `--templates` takes another.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyctx.evals.tasks.predictions import field_of, prediction_of, read_records, text_of, texts_of
from easyctx.evals.tasks.questions import Group, Question
from easyctx.evals.tasks.report import Rows
from easyctx.evals.tasks.scores import contains_topic, last_integer
from easyctx.evals.tasks.shell import PromptShell
from easyctx.evals.tasks.templates import fill
from easyctx.evals.tasks.words import keys

LINES = {
    "lines_intro": "This is a record of lines. Each one gives, for a key, the content of a register, which is a"
    " number. Remember all of them.\n\n",
    "line": "line {key}: REGISTER_CONTENT is <{number}>\n",
    "lines_question": "\nThe record ends here. Which number is the REGISTER_CONTENT of line {key}? Answer with the"
    " number alone.\n",
}
TOPICS = {
    "topics_intro": "This is a record of our conversations, one after the other, on {count} topics. Every topic"
    " begins when the USER wishes to discuss it and names it. Remember the names in their order.\n\n",
    "opening": "USER: I would like to discuss the topic of {topic}.\n",
    "topics_question": "\nThe record ends here. What is the name of topic number {number}, counted from the first?"
    " Answer with its name alone.\n",
}
TEMPLATES = LINES | TOPICS
LARGEST_NUMBER = 50_000
MAX_NEW_TOKENS = {"lines": 100, "topics": 50}
SCORES = {"lines": last_integer, "topics": contains_topic}
ACROSS = {"lines": "num_lines", "topics": "num_topics"}
REFERENCES = {"lines": ("references", "expected_number"), "topics": ("references", "topic", "TOPIC", "topics")}


@dataclass(frozen=True)
class Settings:
    """Of all records: how many a size, questions on each, and the seed. `position` asks one topic always."""

    samples: int
    questions: int
    seed: int
    templates: dict[str, str]
    position: int | None = None


@dataclass(frozen=True)
class Conversation:
    topic: str
    text: str


def lines_group(num_lines: int, sample: int, settings: Settings) -> Group:
    """Questions on one record of `num_lines` lines."""
    rng = random.Random(f"lines {settings.seed} {num_lines} {sample}")
    asked = rng.sample(range(num_lines), settings.questions)
    items = tuple(f"lines/{num_lines}/{sample}/{number}" for number in range(len(asked)))

    def build(shell: PromptShell) -> list[Question]:
        drawn = random.Random(f"register {settings.seed} {num_lines} {sample}")
        names = keys(drawn, num_lines)
        numbers = [drawn.randint(1, LARGEST_NUMBER) for _ in names]
        lines = [
            fill(settings.templates["line"], key=key, number=number) for key, number in zip(names, numbers, strict=True)
        ]
        record = settings.templates["lines_intro"] + "".join(lines)
        return [
            Question(
                item,
                shell.encode(record + fill(settings.templates["lines_question"], key=names[index])),
                [str(numbers[index])],
                {"num_lines": num_lines, "random_idx": index, "correct_line": lines[index].strip()},
            )
            for item, index in zip(items, asked, strict=True)
        ]

    return Group("lines", 16 * num_lines, items, build, last_integer, MAX_NEW_TOKENS["lines"])


def topics_group(conversations: list[Conversation], num_topics: int, sample: int, settings: Settings) -> Group:
    """Questions on one record of `num_topics` conversations, drawn from those given."""
    rng = random.Random(f"topics {settings.seed} {num_topics} {sample}")
    chosen = rng.sample(conversations, num_topics)
    asked = [settings.position - 1] if settings.position else rng.sample(range(num_topics), settings.questions)
    items = tuple(f"topics/{num_topics}/{sample}/{index + 1}" for index in asked)

    def build(shell: PromptShell) -> list[Question]:
        texts = (with_opening(conversation, settings.templates["opening"]) for conversation in chosen)
        record = fill(settings.templates["topics_intro"], count=num_topics) + "\n\n".join(texts)
        return [
            Question(
                item,
                shell.encode(record + "\n" + fill(settings.templates["topics_question"], number=index + 1)),
                [chosen[index].topic],
                {"num_topics": num_topics, "topic_number": index + 1},
            )
            for item, index in zip(items, asked, strict=True)
        ]

    size = sum(len(conversation.text) for conversation in chosen) // 4
    return Group("topics", size, items, build, contains_topic, MAX_NEW_TOKENS["topics"])


def with_opening(conversation: Conversation, opening: str) -> str:
    """The conversation, begun by the user naming its topic where it does not do so itself."""
    text = conversation.text.strip()
    announced = re.search(r"topic of\s+" + re.escape(conversation.topic), text[:500], re.IGNORECASE)
    return text if announced else fill(opening, topic=conversation.topic) + text


def read_conversations(file: Path) -> list[Conversation]:
    """TOPIC and CONVERSATION of each entry; of a topic that comes twice, the first."""
    conversations: dict[str, Conversation] = {}
    for place, row in read_records(file):
        topic, text = (text_of(row, (name,), place) for name in ("TOPIC", "CONVERSATION"))
        if not topic.strip() or not text.strip():
            raise ValueError(f"{place}: TOPIC and CONVERSATION must not be empty")
        conversations.setdefault(topic.strip().lower(), Conversation(topic.strip(), text))
    return list(conversations.values())


def read_prompts(file: Path, task: str) -> list[Group]:
    """Ready prompts, one a row: `prompt` with `expected_number` (lines) or `topics` (topics, the first asked)."""
    return [_ready_group(task, place, number, row) for number, (place, row) in enumerate(read_records(file))]


def _ready_group(task: str, place: str, number: int, row: dict[str, Any]) -> Group:
    prompt = text_of(row, ("prompt",), place)
    references = references_of(task, row, place)
    labels = size_labels(task, row)
    item = f"{task}/{number}"

    def build(shell: PromptShell) -> list[Question]:
        return [Question(item, shell.encode(prompt), references, labels)]

    return Group(task, len(prompt) // 4, (item,), build, SCORES[task], MAX_NEW_TOKENS[task])


def references_of(task: str, row: dict[str, Any], place: str) -> list[str]:
    """What the answer is compared with. Raises ValueError where it cannot be compared."""
    value = field_of(row, REFERENCES[task], place)
    if task == "topics" and "references" not in row and isinstance(value, list):
        value = value[:1]  # LongChat's own files ask for the first of all topics
    references = texts_of(value, place)
    if task == "lines" and not all(re.fullmatch(r"\s*\d+\s*", reference) for reference in references):
        raise ValueError(f"{place}: the expected number is {value!r}, not an integer")
    return references


def size_labels(task: str, row: dict[str, Any]) -> dict[str, int]:
    """Number of lines or topics of a row; 0 where it says nothing about it."""
    number = row.get(ACROSS[task])
    if number is None and task == "topics" and isinstance(row.get("topics"), list):
        number = len(row["topics"])
    return {ACROSS[task]: int(number or 0)}


def read_predictions(file: Path, task: str, label: str) -> Rows:
    """Scored rows of one file of predictions."""
    rows = []
    for number, (place, row) in enumerate(read_records(file)):
        prediction, references = prediction_of(row, place), references_of(task, row, place)
        rows.append(
            {
                "model": row.get("model", label),
                "item": row.get("item", f"{task}/{number}"),
                "kind": task,
                **size_labels(task, row),
                "references": references,
                "prediction": prediction,
                "score": SCORES[task](prediction, references),
            }
        )
    if not rows:
        raise ValueError(f"{file} holds no prediction")
    return rows
