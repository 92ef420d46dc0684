"""How long the documents are that the tokens come from: bins by powers of two, and their picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from easyctx.data.plan import Plan
from easyctx.data.store import Index

MAX_COLOURS = 9  # more sources share the last one


def length_bins(index: Index, plan: Plan, num_sources: int) -> dict[str, Any]:
    """Tokens by the length of their document: bin b holds lengths from `starts[b]` to below twice that.

    `read`: of all documents; `train`: of the training rows, one list for each source.
    """
    powers = np.frexp(np.maximum(index.lengths, 1))[1] - 1  # floor of the logarithm, exact
    low, high = int(powers.min()), int(powers.max())

    def tokens(documents: np.ndarray) -> list[int]:
        weights = np.bincount(powers[documents] - low, index.lengths[documents], high - low + 1)
        return weights.astype(np.int64).tolist()

    return {
        "starts": [1 << power for power in range(low, high + 1)],
        "read": tokens(np.arange(len(powers))),
        "train": [tokens(plan.train[index.sources[plan.train] == number]) for number in range(num_sources)],
    }


def plot_lengths(path: Path, summary: dict[str, Any]) -> None:
    """Bars: shares of the training tokens by the length of their document, sources stacked; line: as read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bins = summary["lengths"]
    places = np.arange(len(bins["starts"]))
    train, read = np.array(bins["train"], dtype=float), np.array(bins["read"], dtype=float)
    names = [source["path"] for source in summary["sources"]]
    if len(names) > MAX_COLOURS:
        train = np.vstack([train[: MAX_COLOURS - 1], train[MAX_COLOURS - 1 :].sum(0)])
        names = [*names[: MAX_COLOURS - 1], f"{len(names) - MAX_COLOURS + 1} more"]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    below = np.zeros(len(places))
    for name, tokens in zip(names, train / train.sum(), strict=True):
        axes.bar(places, tokens, bottom=below, width=0.9, label=_short(name))
        below += tokens
    edges = np.append(places - 0.5, places[-1] + 0.5)
    axes.stairs(read / read.sum(), edges, color="black", linewidth=1.4, label="as read, all sources")
    axes.set_xticks(places, [_label(start) for start in bins["starts"]])
    axes.tick_params(axis="x", rotation=45 if len(places) > 12 else 0)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.set_xlabel("length of the document (tokens, from here to twice as many)")
    axes.set_ylabel("share of the tokens")
    axes.set_title(f"{int(train.sum()):,} training tokens by the length of their document", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(power_of_two: int) -> str:
    """512, 8K (8,192), 1M: as context lengths are called."""
    for shift, unit in ((20, "M"), (10, "K")):
        if power_of_two >> shift:
            return f"{power_of_two >> shift}{unit}"
    return str(power_of_two)


def _short(name: str) -> str:
    return name if len(name) <= 32 else "…" + name[-31:]
