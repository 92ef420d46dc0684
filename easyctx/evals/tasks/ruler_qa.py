"""RULER's two reading tasks, on files in SQuAD's and HotpotQA's own form that the user brings."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easyctx.evals.tasks.ruler_draft import Draft, spare_units
from easyctx.evals.tasks.templates import fill
from easyctx.evals.textio import read_text


@dataclass(frozen=True)
class Reader:
    """A question, its paragraphs (places in the collection), and related ones that stand first in line."""

    question: str
    answers: list[str]
    paragraphs: list[int]
    related: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Collection:
    paragraphs: list[str]
    readers: list[Reader]


def read_squad(file: Path) -> Collection:
    """SQuAD 1.1 or 2.0: `data` of articles of `paragraphs` with `context` and `qas`; unanswerable ones are left out."""
    value = _read_json(file)
    try:
        places: dict[str, int] = {}
        readers = []
        for article in value["data"]:
            own = [places.setdefault(each["context"], len(places)) for each in article["paragraphs"]]
            for place, paragraph in zip(own, article["paragraphs"], strict=True):
                related = [other for other in own if other != place]
                readers += [
                    Reader(each["question"], _answers(each), [place], related)
                    for each in paragraph["qas"]
                    if not each.get("is_impossible")
                ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"--squad {file} is not in SQuAD's form: {error!r} is missing or wrong") from error
    return _collection(list(places), readers, f"--squad {file}")


def read_hotpotqa(file: Path) -> Collection:
    """HotpotQA (distractor setting): a list of `question`, `answer` and `context`, pairs of title and sentences."""
    value = _read_json(file)
    try:
        places: dict[str, int] = {}
        readers = []
        for each in value:
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in each["context"]]
            own = [places.setdefault(text, len(places)) for text in texts]
            readers.append(Reader(each["question"], [str(each["answer"])], list(dict.fromkeys(own))))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--hotpotqa {file} is not in HotpotQA's form: {error!r} is missing or wrong") from error
    return _collection(list(places), readers, f"--hotpotqa {file}")


def reading_draft(
    collection: Collection, reader: Reader, num_units: int, seed: str, templates: dict[str, str]
) -> Draft:
    """The question after `num_units` documents: its own, related ones, then others, in random order."""
    rng = random.Random(f"documents {seed}")
    own = set(reader.paragraphs)
    related = rng.sample(reader.related, len(reader.related))
    left_out = own | set(related)
    others = [place for place in range(len(collection.paragraphs)) if place not in left_out]
    rng.shuffle(others)
    line = [*related, *others]
    wanted = num_units - len(reader.paragraphs)
    # A small collection is gone through again.
    chosen = [*reader.paragraphs, *(line[number % len(line)] for number in range(wanted))]
    rng.shuffle(chosen)
    chosen += [line[number % len(line)] for number in range(wanted, wanted + spare_units(num_units))]
    documents = [
        fill(templates["qa_document"], number=number, text=collection.paragraphs[place])
        for number, place in enumerate(chosen, start=1)
    ]
    return Draft(
        context=templates["qa_intro"] + "\n\n".join(documents[:num_units]) + "\n\n",
        question=fill(templates["qa_question"], question=reader.question),
        answer_prefix=templates["qa_answer"],
        references=reader.answers,
        filler="\n\n".join(documents[num_units:]) + "\n\n",
    )


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is no file")
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _answers(qa: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(answer["text"] for answer in qa["answers"]))


def _collection(paragraphs: list[str], readers: list[Reader], name: str) -> Collection:
    answered = [reader for reader in readers if reader.answers]
    if not answered:
        raise ValueError(f"{name} holds no question with an answer")
    if len(paragraphs) <= max(len(reader.paragraphs) for reader in answered):
        raise ValueError(f"{name} holds only {len(paragraphs)} paragraphs, all of them one question's own")
    return Collection(paragraphs, answered)
