"""Supervised fine-tuning: a record as a text whose responses alone are learnt, cut to a length in its document alone.

A record is one of
- `messages`: a conversation, through the tokenizer's chat template; every assistant turn is a response;
- `prompt` and `response`: two texts, joined as they are;
- `document`, `question` and `answer` (or `answers`, of which the first): the answer is the response.

With `chat` the latter two become a conversation of one turn each way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from easyctx.data.cut import Limit, Span, Tokens, cut_document, cut_response
from easyctx.data.sources import BadRecords, Record, check_text
from easyctx.data.store import without_loss
from easyctx.data.tokenizer import BoundaryTokens

QUESTION = "{document}\n\nQuestion: {question}"
ANSWER = "\nAnswer:"
FIELDS = "messages; prompt and response; or document, question and answer (or answers)"
BATCH_EXAMPLES, BATCH_CHARACTERS = 64, 1 << 20  # at a time: where tokens came from takes some 100 bytes each


@dataclass(frozen=True)
class Example:
    """A text, the character spans that are responses, and the span of the document, which may be cut."""

    text: str
    responses: tuple[Span, ...]
    document: Span | None = None


@dataclass
class ExampleEncoder:
    """Records to tokens. `truncated` counts the examples whose document was cut, `cut_responses` those responses.

    boundary: BOS before and EOS after plain examples; a chat template brings its own.
    max_tokens: longer examples lose the end of their document, or are bad records if they have none.
    max_source: the same for the tokens that are not learnt, alone.
    max_target: of the tokens that are learnt; the last response loses its end, and with it what marks the end.
    """

    tokenizer: Any
    boundary: BoundaryTokens
    max_tokens: int
    chat: bool
    max_source: int | None = None
    max_target: int | None = None
    truncated: int = 0
    cut_responses: int = 0

    def __post_init__(self) -> None:
        check_fast(self.tokenizer)
        if self.chat and self.tokenizer.chat_template is None:
            raise ValueError(f"--chat: {_no_template(self.tokenizer)}")

    def encode(self, records: Iterator[Record], bad: BadRecords) -> Iterator[tuple[str, np.ndarray]]:
        """(where, tokens as `easyctx.data.store` keeps them) of every usable record."""
        batch: list[tuple[str, Example, bool]] = []
        characters = 0
        for record in records:
            try:
                example, is_chat = self._example(record.content)
                check_text(example.text)
            except ValueError as error:
                bad.report(record.where, str(error))
            else:
                batch.append((record.where, example, is_chat))
                characters += len(example.text)
            if len(batch) == BATCH_EXAMPLES or characters >= BATCH_CHARACTERS:
                yield from self._encode(batch, bad)
                batch, characters = [], 0
        yield from self._encode(batch, bad)

    def _encode(self, batch: list[tuple[str, Example, bool]], bad: BadRecords) -> Iterator[tuple[str, np.ndarray]]:
        if not batch:
            return
        texts = [example.text for _, example, _ in batch]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, truncation=False, padding=False, return_offsets_mapping=True
        )
        for (where, example, is_chat), ids, offsets in zip(
            batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            try:
                kept = self._kept(example, np.array(ids, dtype=np.int32), np.array(offsets).reshape(-1, 2), is_chat)
            except ValueError as error:
                bad.report(where, str(error))
            else:
                yield where, kept

    def _kept(self, example: Example, ids: np.ndarray, offsets: np.ndarray, is_chat: bool) -> np.ndarray:
        starts, ends = offsets[:, 0], offsets[:, 1]
        learnt = np.zeros(len(ids), dtype=bool)
        for begin, end in example.responses:
            # A token that reaches from the prompt into the response counts: it holds the response's first letters.
            of_response = (ends > begin) & (starts < end)
            if not of_response.any():
                raise ValueError("a response gives no tokens: there is nothing to learn")
            learnt |= of_response
        marks = BoundaryTokens(None, None, "", "") if is_chat else self.boundary
        bos, eos = (
            np.array([] if token_id is None else [token_id], dtype=np.int32)
            for token_id in (marks.bos_id, marks.eos_id)
        )

        def whole(middle: np.ndarray, mark: object) -> np.ndarray:
            return np.concatenate([np.full(len(bos), mark), middle, np.full(len(eos), mark)])

        learnt = np.concatenate([np.zeros(len(bos), bool), learnt, np.ones(len(eos), bool)])
        ids = np.concatenate([bos, ids, eos])
        tokens = Tokens(ids, whole(starts, -1), whole(ends, -1), learnt, np.ones(len(ids), dtype=bool))
        self._cut(tokens, example)
        return np.where(learnt, ids, without_loss(ids))[tokens.stays]

    def _cut(self, tokens: Tokens, example: Example) -> None:
        if self.max_target is not None:
            self.cut_responses += cut_response(tokens, example.responses[-1], self.max_target)
        source, answer = ("prompt", "response") if example.document is None else ("question", "answer")
        number = int(tokens.stays.sum())
        limits = [Limit("--seq-length", self.max_tokens, number, f"{source} and {answer}")]
        if self.max_source is not None:
            number -= int((tokens.stays & tokens.learnt).sum())
            limits.append(Limit("--max-source-tokens", self.max_source, number, f"{source} and marks"))
        self.truncated += cut_document(tokens, example.document, limits)

    def _example(self, content: str | dict[str, Any]) -> tuple[Example, bool]:
        """The example of a record, and whether it is a chat."""
        if isinstance(content, str):
            raise ValueError(f"plain text, where --sft needs records with {FIELDS}")
        if content.get("messages") is not None:
            if self.tokenizer.chat_template is None:
                raise ValueError(_no_template(self.tokenizer))
            return self._conversation(_messages(content["messages"])), True
        prompt, response, document = _prompt_and_response(content)
        if self.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return self._conversation(turns, document), True
        if document is not None:
            prompt, response = prompt + ANSWER, " " + response
        return Example(prompt + response, ((len(prompt), len(prompt) + len(response)),), document), False

    def _conversation(self, messages: list[dict[str, str]], document: Span | None = None) -> Example:
        text = self._render(messages, False)
        responses = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(messages[:number], True), self._render(messages[: number + 1], False)
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise ValueError(
                    f"the chat template writes turn {number + 1} otherwise once others follow it, so its response "
                    "cannot be found: give each response as a conversation of its own"
                )
            responses.append((len(before), len(after.rstrip())))
        if document is None:
            return Example(text, tuple(responses))
        content = messages[0]["content"]
        at = text.find(content)
        if at < 0:
            raise ValueError("the chat template changes the document, so that it cannot be found again to be cut")
        return Example(text, tuple(responses), (at + document[0], at + document[1]))

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return _render(self.tokenizer, messages, add_generation_prompt)


def check_fast(tokenizer: Any) -> None:
    """ValueError for a tokenizer that cannot tell which characters a token came from."""
    if not tokenizer.is_fast:
        raise ValueError(
            "to learn responses alone, and to cut documents alone, it must be known which characters each token came "
            f"from, which {type(tokenizer).__name__} cannot tell: use a fast tokenizer"
        )


def _no_template(tokenizer: Any) -> str:
    return (
        f"tokenizer {tokenizer.name_or_path} has no chat template: use an instruct model's tokenizer, or give prompt "
        "and response"
    )


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates raise whatever they like, for roles that they refuse
        raise ValueError(f"the chat template refuses it: {error}") from error


def chat_prompt(tokenizer: Any, messages: Any) -> str:
    """A conversation up to its last turn that is not the assistant's, and what then calls for an answer."""
    if tokenizer.chat_template is None:
        raise ValueError(_no_template(tokenizer))
    turns = _turns(messages)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError("no message that could be answered")
    return _render(tokenizer, turns, True)


def _prompt_and_response(content: dict[str, Any]) -> tuple[str, str, Span | None]:
    """Prompt, response, and the document's span in the prompt."""
    if "prompt" in content and "response" in content:
        return _text(content, "prompt"), _response(_text(content, "response")), None
    if not {"document", "question"} <= set(content) or not {"answer", "answers"} & set(content):
        raise ValueError(f"fields {', '.join(map(repr, sorted(content)))}, where --sft needs {FIELDS}")
    answer = content.get("answer")
    if answer is None:
        answers = list(content["answers"]) if content.get("answers") is not None else []
        answer = answers[0] if answers else ""
    if not isinstance(answer, str):
        raise ValueError(f"the answer is {type(answer).__name__}, not a string")
    prompt, document = _question(content)
    return prompt, _response(answer).strip(), document


def prompt_of(content: dict[str, Any]) -> tuple[str, Span | None]:
    """A record's prompt as it stands before the response, which is not needed; and its document's span."""
    if "prompt" in content:
        return _text(content, "prompt"), None
    if not {"document", "question"} <= set(content):
        raise ValueError(f"fields {', '.join(map(repr, sorted(content)))}: give a prompt, or a document and a question")
    prompt, document = _question(content)
    return prompt + ANSWER, document


def _question(content: dict[str, Any]) -> tuple[str, Span]:
    document, question = _text(content, "document").strip(), _text(content, "question").strip()
    return QUESTION.format(document=document, question=question), (0, len(document))


def _response(text: str) -> str:
    if not text.strip():
        raise ValueError("the response is empty: there is nothing to learn")
    return text


def _text(content: dict[str, Any], field: str) -> str:
    value = content[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {type(value).__name__}, not a string")
    return value


def _turns(value: Any) -> list[dict[str, str]]:
    turns = list(value)
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError("a message has no role")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"the content of a message is {type(turn.get('content')).__name__}, not a string")
    return turns


def _messages(value: Any) -> list[dict[str, str]]:
    turns = _turns(value)
    for turn in turns:
        if turn["role"] == "assistant":
            _response(turn["content"])
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("no message of the assistant: there is nothing to learn")
    return turns
