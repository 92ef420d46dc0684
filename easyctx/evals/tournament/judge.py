"""Who judges: any OpenAI-compatible endpoint, or a local model; and how its answer is read."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from easyctx.evals.tasks.templates import fill

TEMPLATES = {
    "system": "You compare the answers of two assistants to a question, without favour to either or to the order in"
    " which they come.",
    "comparison": "[Question]\n{question}\n[End of the question]\n\n[Answer of assistant 1]\n{first}\n[End of answer 1]"
    "\n\n[Answer of assistant 2]\n{second}\n[End of answer 2]\n\nScore each answer from 1 (poor) to 10 (very good) for"
    " being helpful, relevant, correct and detailed enough. The length of an answer and its place do not count."
    " On the first line write nothing but the two scores, that of assistant 1 first, with a space between them. Then"
    " give your reasons.\n",
    "again": "\nWrite the two scores alone on the first line, as in this example of the form: 3 7\n",
}
SCORES = re.compile(r"^\W*(?<!-)(\d+(?:\.\d+)?)\s*[\s,;|]\s*(\d+(?:\.\d+)?)\W*$")
LOWEST, HIGHEST = 1.0, 10.0
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class Judge(Protocol):
    """Answers a system and a user message with text."""

    def ask(self, system: str, user: str) -> str: ...


def read_scores(text: str) -> tuple[float, float] | None:
    """The two scores, which stand alone on one line; None where no line, or not just one pair, is such."""
    found = {(float(match[1]), float(match[2])) for line in text.splitlines() if (match := SCORES.match(line))}
    if len(found) != 1:
        return None
    [(one, two)] = found
    return (one, two) if all(LOWEST <= score <= HIGHEST for score in (one, two)) else None


@dataclass(frozen=True)
class Verdict:
    """`scores` of first and second; None where no answer of the judge could be read. `text` is its last answer."""

    scores: tuple[float, float] | None
    text: str
    num_tries: int


def compare(judge: Judge, templates: dict[str, str], question: str, first: str, second: str, tries: int) -> Verdict:
    """Asks until an answer can be read, at most `tries` times. What cannot be read is never scored."""
    user = fill(templates["comparison"], question=question, first=first, second=second)
    text = ""
    for number in range(1, tries + 1):
        text = judge.ask(templates["system"], user if number == 1 else user + templates["again"])
        scores = read_scores(text)
        if scores is not None:
            return Verdict(scores, text, number)
    return Verdict(None, text, tries)


@dataclass
class HttpJudge:
    """`POST url/chat/completions`. What may pass (no connection, 429, 5xx) is tried again after growing waits.

    Raises ValueError where it does not pass, or the endpoint refuses.
    """

    url: str
    model: str
    api_key: str | None = None
    max_tokens: int = 512
    timeout: float = 120.0
    waits: tuple[float, ...] = WAITS
    say: Callable[[str], None] = print
    num_retries: int = field(default=0, init=False)

    def ask(self, system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        reply = self._post(json.dumps(body).encode())
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"the judge at {self.url} does not answer as an OpenAI endpoint: {reply[:200]!r}"
            ) from error
        return content if isinstance(content, str) else ""

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data=body, headers=headers)
        for wait in (*self.waits, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    data: bytes = response.read()
                    return data
            except urllib.error.HTTPError as error:
                problem, after = f"{error.code} {error.reason}", error.headers.get("Retry-After")
                if error.code not in RETRIED:
                    said = error.read()[:300].decode("utf-8", "replace")
                    raise ValueError(f"the judge at {self.url} refuses: {problem}: {said}") from error
            except (OSError, http.client.HTTPException) as error:
                problem, after = str(error), None
            if wait is not None:
                self._wait(problem, max(wait, float(after)) if after and after.isdigit() else wait)
        raise ValueError(
            f"the judge at {self.url} did not answer in {len(self.waits) + 1} tries: {problem}. "
            "What it judged before is kept: start it and give the same command again"
        )

    def _wait(self, problem: str, seconds: float) -> None:
        self.num_retries += 1
        self.say(f"judge: {problem}; trying again in {seconds:g} s")
        time.sleep(seconds)


def make_http_judge(url: str, model: str | None, key_variable: str, say: Callable[[str], None]) -> HttpJudge:
    """Raises ValueError for what is no http address or lacks a model's name."""
    if not re.match(r"https?://[^/]+", url):
        raise ValueError(f"--judge-url is {url!r}; give an address such as http://localhost:8000/v1")
    if not model:
        raise ValueError("--judge-url needs --judge-model, the name that the endpoint knows its model by")
    return HttpJudge(url, model, os.environ.get(key_variable), say=say)


@dataclass
class LocalJudge:
    """A model of this machine. Its chat template is used where it has one."""

    generator: Any
    tokenizer: Any
    max_tokens: int = 64

    def ask(self, system: str, user: str) -> str:
        if getattr(self.tokenizer, "chat_template", None):
            # Some templates know no system message; what it says may as well stand before the question.
            message = [{"role": "user", "content": f"{system}\n\n{user}"}]
            text = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(f"{system}\n\n{user}\nScores:\n")["input_ids"]
        [answer] = self.generator.answer(ids, max_new_tokens=self.max_tokens)
        return str(answer.text)
