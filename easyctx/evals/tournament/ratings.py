"""Ratings from battles: Elo in their order, Bradley-Terry without one, and bootstrap intervals of both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

K, START = 32.0, 1000.0
SCALE = 400.0  # points at which the odds are ten to one
PRIOR = 0.5  # wins for either side that Bradley-Terry counts in each pair: who won all stays finite
RESAMPLES = 1000
MOST_STEPS = 100  # of Newton's method, which takes about ten


@dataclass(frozen=True)
class Battle:
    """`score` is the first model's: 1 won, 0.5 tied, 0 lost. `question` tells which battles belong together."""

    first: str
    second: str
    score: float
    question: str | None = None


Ratings = dict[str, float]


def expected(rating: float, other: float) -> float:
    """The share of points that Elo expects of a model against another."""
    return 1 / (1 + 10 ** ((other - rating) / SCALE))


def elo(battles: list[Battle], models: list[str], k: float = K, start: float = START) -> Ratings:
    """Ratings after all battles, one after the other (Elo, The Rating of Chessplayers, 1978)."""
    ratings = dict.fromkeys(models, start)
    for battle in battles:
        change = k * (battle.score - expected(ratings[battle.first], ratings[battle.second]))
        ratings[battle.first] += change
        ratings[battle.second] -= change
    return ratings


def bradley_terry(battles: list[Battle], models: list[str], start: float = START) -> Ratings:
    """The most likely ratings if each battle is drawn by `expected`, with a mean of `start`; a tie is half a win.

    Bradley and Terry, Biometrika 39, 1952.
    """
    place = {model: number for number, model in enumerate(models)}
    wins = np.zeros((len(models), len(models)))
    for battle in battles:
        first, second = place[battle.first], place[battle.second]
        wins[first, second] += battle.score
        wins[second, first] += 1 - battle.score
    wins += PRIOR * (wins + wins.T > 0)
    both, won = wins + wins.T, wins.sum(1)
    logits = np.zeros(len(models))
    for _ in range(MOST_STEPS):
        share = 1 / (1 + np.exp(logits - logits[:, None]))  # that the row's model is expected to win of the column's
        spread = both * share * (1 - share)
        curvature = np.diag(spread.sum(1)) - spread
        # Only differences matter, and those of models that did not meet are not known: pinv leaves both alone.
        step = np.linalg.pinv(curvature) @ (won - (both * share).sum(1))
        logits = logits + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    logits = logits - logits.mean()
    return {model: start + SCALE / np.log(10) * float(logits[place[model]]) for model in models}


def bootstrap(
    rate: Callable[[list[Battle], list[str]], Ratings],
    battles: list[Battle],
    models: list[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals over battles drawn anew, which also come in another order each time.

    What a pair did on one question (both orders, and again) is drawn together: it is one observation.
    """
    together: dict[object, list[Battle]] = {}
    for number, battle in enumerate(battles):
        pair = frozenset((battle.first, battle.second))
        together.setdefault(number if battle.question is None else (pair, battle.question), []).append(battle)
    groups = list(together.values())
    rng = random.Random(seed)
    drawn = [
        rate([battle for group in rng.choices(groups, k=len(groups)) for battle in group], models)
        for _ in range(resamples)
    ]
    low, high = int(0.025 * resamples), min(int(0.975 * resamples), resamples - 1)
    intervals = {}
    for model in models:
        values = sorted(ratings[model] for ratings in drawn)
        intervals[model] = (values[low], values[high])
    return intervals


@dataclass(frozen=True)
class Round:
    """Who answers first and who second on which question."""

    question: str
    first: str
    second: str


def schedule(questions: list[str], models: list[str], num_rounds: int, seed: int) -> list[Round]:
    """Rounds by turns of all pairs, each question in both orders, one after the other.

    A longer schedule begins with a shorter one. A pair's questions come again only when all had their turn.
    """
    rng = random.Random(f"rounds {seed}")
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    left: dict[tuple[str, str], list[str]] = {pair: [] for pair in pairs}
    rounds: list[Round] = []
    while len(rounds) < num_rounds:
        rng.shuffle(pairs)
        for pair in pairs:
            if not left[pair]:
                left[pair] = rng.sample(questions, len(questions))
            question = left[pair].pop()
            first, second = rng.sample(pair, 2)
            rounds += [Round(question, first, second), Round(question, second, first)]
    return rounds[:num_rounds]
