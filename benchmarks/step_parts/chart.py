"""The chart of benchmarks/train_step.py: tokens/s and peak GPU memory of every method, by sequence length."""

import os
from pathlib import Path
from typing import Any

from easyctx.evals.plots import length_labels

Row = dict[str, Any]
OWN = ("#1b7837", "#7fbf7b", "#a6dba0")
OTHERS = ("#b2182b", "#d6604d", "#f4a582", "#e08214", "#9970ab")
PANELS = (("tokens_per_s", "tokens/s"), ("peak_gpu_gib", "peak GiB a GPU"))


def draw(rows: list[Row], path: Path) -> Path | None:
    """Write the chart of the rows that have figures, and return its path; None if all of them failed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error_message" not in row]
    if not rows:
        return None
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [method for method in methods if method.startswith("easyctx")]
    others = [method for method in methods if method not in own]
    colours = {m: shades[i % len(shades)] for ms, shades in ((own, OWN), (others, OTHERS)) for i, m in enumerate(ms)}
    panels = [(key, unit) for key, unit in PANELS if any(row.get(key) is not None for row in rows)]
    size = (9, 1.2 + 2.7 * len(panels))
    figure, grid = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, (key, unit) in zip(grid[:, 0], panels, strict=True):
        _bars(axes, [row for row in rows if row.get(key) is not None], methods, colours, key)
        axes.set_ylabel(unit)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[method]) for method in methods]
    figure.legend(handles, methods, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    first = rows[0]
    device = "process" if first["peak_gpu_gib"] is None else "GPU"
    where = f"{first['gpus']} {device}{'' if first['gpus'] == 1 else 'es' if device == 'process' else 's'}"
    timed = f" ({first['layers_timed']} timed)" if "layers_timed" in first else ""
    title = f"One training step, {first['model']} shape, {first['layers']} layers{timed}: {where}"
    figure.suptitle(title, fontsize=11)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _bars(axes: Any, rows: list[Row], methods: list[str], colours: dict[str, str], key: str) -> None:
    """Groups by length, from left to right; above each bar its figure. A method that failed leaves a gap."""
    groups = sorted({row["seq_length"] for row in rows})
    width = 0.86 / len(methods)
    for row in rows:
        x = groups.index(row["seq_length"]) + (methods.index(row["method"]) - (len(methods) - 1) / 2) * width
        axes.bar(x, row[key], width * 0.92, color=colours[row["method"]])
        axes.text(
            x,
            row[key],
            f"{row[key]:,.0f}" if row[key] >= 10 else f"{row[key]:.2g}",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axes.set_xticks(range(len(groups)), [f"{shown} tokens" for shown in length_labels(groups).values()])
    axes.set_ylim(top=1.15 * max(row[key] for row in rows))  # room for the figures above the bars
    axes.spines[["top", "right"]].set_visible(False)
