"""NarrativeQA in ZeroSCROLLS' form: rows, references merged by id, documents cut to a length.

ZeroSCROLLS: Shaham et al., arXiv 2305.14196; NarrativeQA: Kocisky et al., TACL 2018.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from easyctx.evals.tasks.predictions import field_of, prediction_of, read_records, text_of, texts_of
from easyctx.evals.tasks.questions import Group, Question
from easyctx.evals.tasks.report import Rows
from easyctx.evals.tasks.scores import token_f1
from easyctx.evals.tasks.shell import PromptShell

MAX_NEW_TOKENS = 64
KIND = "narrativeqa"
INDICES = ("document_start_index", "document_end_index", "query_start_index", "query_end_index")


@dataclass(frozen=True)
class Example:
    """One question: `text` up to `document_end` is kept as far as there is room, from `query_start` on always."""

    id: str
    pid: str
    text: str
    references: tuple[str, ...]
    document_start: int
    document_end: int
    query_start: int
    separator: str

    @property
    def query(self) -> str:
        return self.text[self.query_start :]


def read_examples(file: Path) -> list[Example]:
    """The examples in order; rows of one id are one question with several references."""
    examples: dict[str, Example] = {}
    for place, row in read_records(file):
        example = _example(row, place)
        before = examples.get(example.id)
        if before is None:
            examples[example.id] = example
        elif before.text != example.text:
            raise ValueError(f"{place}: id {example.id} came before with another input")
        else:
            merged = dict.fromkeys((*before.references, *example.references))
            examples[example.id] = replace(before, references=tuple(merged))
    if not examples:
        raise ValueError(f"{file} holds no example")
    return list(examples.values())


def _example(row: dict[str, Any], place: str) -> Example:
    text = text_of(row, ("input",), place)
    begin, end, query, query_end = (int(field_of(row, (name,), place)) for name in INDICES)
    if not 0 <= begin <= end <= query <= query_end <= len(text):
        raise ValueError(f"{place}: the indices {begin}, {end}, {query}, {query_end} do not fit {len(text)} characters")
    output = row.get("output")
    return Example(
        id=str(field_of(row, ("id",), place)),
        pid=str(row.get("pid", "")),
        text=text,
        references=tuple(texts_of(output, place)) if output is not None else (),
        document_start=begin,
        document_end=end,
        query_start=query,
        separator=text_of(row, ("truncation_seperator", "truncation_separator"), place),
    )


def groups_of(examples: list[Example], max_length: int | None, max_new_tokens: int) -> list[Group]:
    """The examples in groups of one document; prompt and answer have at most `max_length` tokens."""
    by_document: dict[str, list[Example]] = {}
    for example in examples:
        by_document.setdefault(example.text[: example.document_end], []).append(example)
    return [_group(same, max_length, max_new_tokens) for same in by_document.values()]


def _group(examples: list[Example], max_length: int | None, max_new_tokens: int) -> Group:
    def build(shell: PromptShell) -> list[Question]:
        return [_question(shell, example, max_length, max_new_tokens) for example in examples]

    size = len(examples[0].text) // 4
    items = tuple(example.id for example in examples)
    return Group(KIND, min(size, max_length or size), items, build, token_f1, max_new_tokens)


def _question(shell: PromptShell, example: Example, max_length: int | None, max_new_tokens: int) -> Question:
    ids = shell.encode(example.text)
    labels: dict[str, Any] = {"pid": example.pid, "cut": False}
    if max_length is not None and len(ids) > max_length - max_new_tokens:
        tail = example.separator + example.query + shell.after
        text = example.text[: example.document_end]
        try:
            ids, _ = shell.cut(text, example.document_start, tail, max_length - max_new_tokens)
        except ValueError as error:
            raise ValueError(
                f"--max-length {max_length}, {max_new_tokens} of them for the answer, is too short for "
                f"question {example.id}: {error}"
            ) from error
        labels["cut"] = True
    return Question(example.id, ids, list(example.references), labels)


def read_predictions(file: Path, label: str, references: dict[str, tuple[str, ...]]) -> Rows:
    """Scored rows of a file of predictions: with their own references, or those of `references` by id."""
    rows = []
    for number, (place, row) in enumerate(read_records(file)):
        name = str(row.get("item") or row.get("id") or number)
        own = row.get("references") or row.get("outputs")
        if own is None and name not in references:
            raise ValueError(f"{place}: no reference for id {name!r}; give the questions with --data")
        wanted = texts_of(own, place) if own is not None else list(references[name])
        prediction = prediction_of(row, place)
        rows.append(
            {
                "model": row.get("model", label),
                "item": name,
                "kind": KIND,
                "references": wanted,
                "prediction": prediction,
                "score": token_f1(prediction, wanted),
            }
        )
    if not rows:
        raise ValueError(f"{file} holds no prediction")
    return rows
