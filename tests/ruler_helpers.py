"""Sources for RULER, its prompts, and solvers that were written apart from them."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

from easyctx.evals.tasks.questions import Question
from easyctx.evals.tasks.ruler_groups import Sources, group_of
from easyctx.evals.tasks.ruler_qa import Collection, read_hotpotqa, read_squad
from easyctx.evals.tasks.ruler_tasks import TASKS
from easyctx.evals.tasks.shell import PromptShell
from tests.eval_helpers import encoder, english, tokenizer

PARAGRAPHS = [text for text in english().split("\n\n") if 80 < len(text) < 400][:60]

SQUAD = {
    "data": [
        {
            "title": f"article {first}",
            "paragraphs": [
                {
                    "context": text,
                    "qas": [
                        {"question": f"Which is {first} {at}?", "answers": [{"text": text[:12]}, {"text": text[:20]}]},
                        {"question": "Impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for at, text in enumerate(PARAGRAPHS[first : first + 6])
            ],
        }
        for first in range(0, 60, 6)
    ]
}

HOTPOT = [
    {
        "question": f"How so {i}?",
        "answer": PARAGRAPHS[i][:9],
        "context": [[f"T{k}", [PARAGRAPHS[k]]] for k in (i, i + 1)],
    }
    for i in range(0, 60, 2)
]


def write_sources(folder: Path) -> list[str]:
    """The flags of RULER's sources, which are written here."""
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpot.json").write_text(json.dumps(HOTPOT))
    (folder / "essay.txt").write_text(english())
    paths = {"--haystack": "essay.txt", "--squad": "squad.json", "--hotpotqa": "hotpot.json"}
    return [each for flag, name in paths.items() for each in (flag, str(folder / name))]


def read_sources(files: list[str]) -> dict[str, Collection]:
    return {"squad": read_squad(Path(files[3])), "hotpotqa": read_hotpotqa(Path(files[5]))}


@cache
def shell(name: str) -> PromptShell:
    return PromptShell(encoder(name))


def build(task: str, length: int, sources: Sources, name: str = "byte_bpe", sample: int = 0) -> tuple[str, Question]:
    sources.longest = max(sources.longest, 8192)
    [question] = group_of(task, length, sample, sources, TASKS[task].max_new_tokens).build(shell(name))
    return tokenizer(name).decode(question.ids.tolist()), question


def solve(prompt: str) -> str:
    """Answers any of the prompts from their text alone, without the code that made them."""
    if asked := re.search(r"does the text give for (.*)\?", prompt):
        keys = re.split(", | and ", asked[1])
        return " ".join(value for key in keys for value in re.findall(rf"for {key} is: (\S+)\.", prompt))
    if asked := re.findall(r"Which variables have the value (\d+)", prompt):
        text = prompt[prompt.rindex("Variables are assigned") :]
        value: dict[str, str] = {}
        for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            value[name] = value.get(given, given)
        return " ".join(name for name, given in value.items() if given == asked[-1])
    if "numbered list" in prompt:
        words = re.findall(r"\d+\. ([a-z-]+)", prompt[prompt.rindex("numbered list") :])
        return " ".join(word for word, _ in Counter(words).most_common(10))
    if "coded words" in prompt:
        words = re.findall(r"\b[a-z]{6}\b", prompt.split("\n\n")[1])
        return " ".join(word for word, _ in Counter(words).most_common(3))
    number = int(re.findall(r"\d+", prompt[prompt.rindex("Question:") :])[0])
    at = int(re.findall(r"\d+", prompt[prompt.rindex("Question:") :])[-1]) if "Which is" in prompt else 0
    answer = PARAGRAPHS[number + at][:20]
    return answer if answer in prompt else "nothing"
