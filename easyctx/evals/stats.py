"""Intervals: every score comes with one."""

from __future__ import annotations

import math

import numpy as np


def wilson_interval(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson, JASA 22, 1927), (0, 1) where there is nothing."""
    if num_all == 0:
        return 0.0, 1.0
    share = num_right / num_all
    scale = 1 + z * z / num_all
    centre = (share + z * z / (2 * num_all)) / scale
    half = z * math.sqrt(share * (1 - share) / num_all + z * z / (4 * num_all**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_ratio(
    sums: list[float], counts: list[int], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """The 95% percentile interval of sum(sums) / sum(counts) over resampled documents (Efron, 1979).

    None for fewer than two documents, which say nothing about their spread.
    """
    if len(sums) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    ratios = np.asarray(sums)[drawn].sum(1) / np.asarray(counts)[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def score_interval(scores: list[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean of scores from 0 to 1: Wilson's where all are 0 or 1, else the bootstrap's."""
    if all(score in (0, 1) for score in scores):
        return wilson_interval(round(sum(scores)), len(scores))
    return bootstrap_ratio(scores, [1] * len(scores))


def average_interval(groups: list[list[float]], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """The 95% interval of the mean of the groups' means, each group resampled by itself.

    Wilson's of all together where all scores are 0 or 1 and the groups equally large, or all scores the same: then
    nothing is left to resample.
    """
    scores = [score for group in groups for score in group]
    alike = len({len(group) for group in groups}) == 1 or len(set(scores)) == 1
    if len(groups) == 1 or (alike and all(score in (0, 1) for score in scores)):
        return score_interval(scores)
    if max(len(group) for group in groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = [np.asarray(group)[rng.integers(0, len(group), size=(resamples, len(group)))] for group in groups]
    means = np.mean([each.mean(1) for each in drawn], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def perplexity(mean_nll: float) -> float | None:
    """exp of a mean NLL in nats; None where that is past the largest float."""
    return math.exp(mean_nll) if mean_nll < 709 else None
