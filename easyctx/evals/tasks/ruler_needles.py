"""RULER's eight needle tasks and variable tracking."""

from __future__ import annotations

import random
import string
import uuid
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from easyctx.evals.haystack import Haystack, Insertion, fit_count
from easyctx.evals.tasks.ruler_draft import Draft, spare_units
from easyctx.evals.tasks.ruler_tasks import Needles, Tracking
from easyctx.evals.tasks.shell import PromptShell
from easyctx.evals.tasks.templates import fill
from easyctx.evals.tasks.words import keys

DEPTHS = 40  # a needle in an essay lies at one of so many depths, as NVIDIA places it


@dataclass(frozen=True)
class Hidden:
    """The needles of one prompt with their places (0 to 1), and what is asked of them."""

    sentences: list[tuple[float, str]]
    intro: str
    question: str
    answer_prefix: str
    references: list[str]


def draw_needles(spec: Needles, seed: str, templates: dict[str, str]) -> Hidden:
    """The needles of one prompt; they do not depend on its length."""
    rng = random.Random(f"needles {seed}")
    kind = spec.value
    names = _tokens_of(spec.key, rng, spec.keys)
    values = {name: _tokens_of(kind, rng, spec.values) for name in names}
    sentences = [
        fill(templates["needle"], kind=kind, key=name, value=value) for name in names for value in values[name]
    ]
    depths = rng.sample(range(DEPTHS), len(sentences))
    asked = names[: spec.queries]
    listed = _listed(asked)
    return Hidden(
        sentences=[(depth / (DEPTHS - 1), text) for depth, text in zip(depths, sentences, strict=True)],
        intro=fill(templates["niah_intro"], kind=kind),
        question=fill(templates["niah_question"], kind=kind, keys=listed),
        answer_prefix=fill(templates["niah_answer"], kind=kind, keys=listed),
        references=[value for name in asked for value in values[name]],
    )


def needle_draft(spec: Needles, num_units: int, seed: str, templates: dict[str, str]) -> Draft:
    """Needles between repeated noise or among other needles; a unit is one of either."""
    hidden = draw_needles(spec, seed, templates)
    num_all = num_units + spare_units(num_units)
    units = (
        [templates["noise"]] * num_all if spec.haystack == "noise" else _others(spec, num_all, hidden, seed, templates)
    )
    return Draft(
        context=hidden.intro + "\n".join(_mixed(units[:num_units], hidden.sentences)) + "\n",
        question=hidden.question,
        answer_prefix=hidden.answer_prefix,
        references=hidden.references,
        filler="\n".join(units[num_units:]),
    )


def _others(spec: Needles, count: int, hidden: Hidden, seed: str, templates: dict[str, str]) -> list[str]:
    """Needles that are not asked for, with other keys and values than the hidden ones."""
    rng = random.Random(f"other needles {seed}")
    names, values = _tokens_of(spec.key, rng, count + 1), _tokens_of(spec.value, rng, count + 1)
    asked = " ".join(text for _, text in hidden.sentences)
    others = [
        (name, value) for name, value in zip(names, values, strict=True) if name not in asked and value not in asked
    ]
    return [fill(templates["needle"], kind=spec.value, key=name, value=value) for name, value in others[:count]]


def tracking_draft(spec: Tracking, num_units: int, seed: str, templates: dict[str, str]) -> Draft:
    """A chain of assignments between repeated noise, after one worked example."""
    example = _chain(spec, 2 * (spec.hops + 1), f"example {seed}", templates)
    asked = _chain(spec, num_units, seed, templates)
    shown = example.context + example.question + example.answer_prefix + " " + " ".join(example.references)
    return replace(asked, context=shown + "\n\n" + asked.context)


def _chain(spec: Tracking, num_units: int, seed: str, templates: dict[str, str]) -> Draft:
    rng = random.Random(f"chain {seed}")
    value = str(rng.randint(10_000, 99_999))
    names: list[str] = []
    while len(names) < spec.hops + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    statements = [fill(templates["vt_first"], name=names[0], value=value)]
    statements += [fill(templates["vt_next"], name=name, before=before) for before, name in pairwise(names)]
    places = sorted(rng.random() for _ in statements)
    noise = templates["noise"]
    units = _mixed([noise] * num_units, list(zip(places, statements, strict=True)))
    return Draft(
        context=templates["vt_intro"] + "\n".join(units) + "\n",
        question=fill(templates["vt_question"], value=value),
        answer_prefix=fill(templates["vt_answer"], value=value, count=len(names)),
        references=names,
        filler="\n".join([noise] * spare_units(num_units)),
    )


def essay_prompt(shell: PromptShell, haystack: Haystack, hidden: Hidden, num_tokens: int) -> np.ndarray:
    """Tokens [num_tokens] of the prompt that hides needles after sentences of an essay."""
    before = shell.before + hidden.intro
    tail = hidden.question + shell.after + hidden.answer_prefix
    fixed = " ".join([before, *(text for _, text in hidden.sentences), tail])
    room = num_tokens - len(shell.encoder.encode(fixed).ids) - len(shell.leading)
    if room <= 0:
        taken, left = num_tokens - room, max(num_tokens, 0)
        raise ValueError(f"needles and question alone take {taken} tokens, and there is room for {left}")
    planned = haystack.chars_of(0, room)
    insertions = [Insertion(haystack.place(0, planned, depth), text) for depth, text in hidden.sentences]

    def encode(num_chars: int, filler: str) -> np.ndarray:
        pieces, _ = haystack.insert(0, num_chars, insertions, before, filler + tail)
        return np.concatenate([np.asarray(shell.leading, dtype=np.int64), haystack.pieces.encode_pieces(pieces).ids])

    num_chars, filler = fit_count(
        lambda chars, filler: len(encode(chars, filler)),
        target=num_tokens,
        guess=planned,
        move=lambda chars, tokens: chars + haystack.chars_of(chars, tokens),
        limit=len(haystack.text),
    )
    return encode(num_chars, filler)


def _mixed(units: list[str], placed: list[tuple[float, str]]) -> list[str]:
    """The units with the placed texts between them, each at its share of the way (0 to 1)."""
    at: dict[int, list[str]] = {}
    for place, text in sorted(placed, key=lambda pair: pair[0]):
        at.setdefault(round(place * len(units)), []).append(text)
    mixed: list[str] = []
    for number, unit in enumerate([*units, ""]):
        mixed += at.get(number, [])
        mixed.append(unit)
    return mixed[:-1]


def _tokens_of(kind: str, rng: random.Random, count: int) -> list[str]:
    """Different keys or values: words ("quiet-harbour"), numbers of seven digits, or uuids."""
    if kind == "words":
        return keys(rng, count)
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
