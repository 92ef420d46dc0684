"""The chart of benchmarks/attention.py: TFLOP/s a GPU of every method, a panel for each shape and mask."""

import os
from pathlib import Path
from typing import Any

from attention_parts.methods import LOCAL
from easyctx.evals.plots import length_labels
from easyctx.modes import MODES

Row = dict[str, Any]
# The local kernels grey, easyctx in greens, other packages in warm colours; from left to right.
COLOURS = {
    "local": ("#4d4d4d", "#878787", "#bababa"),
    "own": ("#00441b", "#1b7837", "#4d9221", "#5aae61", "#80cdc1", "#a6dba0"),
    "other": ("#b2182b", "#d6604d", "#f4a582", "#b35806", "#e08214", "#762a83", "#9970ab"),
}
KINDS = list(COLOURS)


def draw(rows: list[Row], path: Path) -> Path | None:
    """Write the chart of the rows that have figures, and return its path; None if all of them failed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error_message" not in row]
    panels = list(dict.fromkeys((row["q_heads"], row["kv_heads"], row["mask"]) for row in rows))
    if not panels:
        return None
    rows.sort(key=lambda row: KINDS.index(_kind(row)))
    labels = list(dict.fromkeys(_label(row) for row in rows))
    colours = _colours(rows)
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(10, 1.2 + 2.9 * len(panels)), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        of_panel = [row for row in rows if (row["q_heads"], row["kv_heads"], row["mask"]) == panel]
        _bars(axes, of_panel, [label for label in labels if label in map(_label, of_panel)], colours)
        axes.set_title(f"{panel[0]} query and {panel[1]} key/value heads, {panel[2]}", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[label]) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    first = next((row for row in rows if row["method"] != LOCAL), rows[0])
    where = f"{first['gpus']} {'ranks of a CPU' if first['peak_gib'] is None else 'GPUs'}"
    where = f"one of {first['ranks']} ranks, without a network" if "ranks" in first else where
    what = f"Attention, forward + backward, {first['dtype']}, head dim {first['head_dim']}"
    figure.suptitle(f"{what}: {where}", fontsize=11)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)
    return path


def _label(row: Row) -> str:
    return f"{row['method']}, {row['kernel']}"


def _kind(row: Row) -> str:
    if row["method"] == LOCAL:
        return "local"
    return "own" if row["method"] in MODES else "other"


def _colours(rows: list[Row]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, palette in COLOURS.items():
        labels = dict.fromkeys(_label(row) for row in rows if _kind(row) == kind)
        found |= {label: palette[i % len(palette)] for i, label in enumerate(labels)}
    return found


def _bars(axes: Any, rows: list[Row], labels: list[str], colours: dict[str, str]) -> None:
    """Groups by tokens a GPU, from left to right; above each bar its rate."""
    groups = sorted({row["tokens_per_gpu"] for row in rows})
    width = 0.86 / len(labels)
    for row in rows:
        place = labels.index(_label(row))
        x = groups.index(row["tokens_per_gpu"]) + (place - (len(labels) - 1) / 2) * width
        rate = row["tflops_per_gpu"]
        axes.bar(x, rate, width * 0.92, color=colours[_label(row)])
        axes.text(x, rate, f" {rate:.3g}", ha="center", va="bottom", fontsize=6, rotation=90)
    axes.set_xticks(range(len(groups)), [f"{shown} tokens a GPU" for shown in length_labels(groups).values()])
    axes.set_ylabel("TFLOP/s a GPU")
    axes.set_ylim(top=1.2 * max(row["tflops_per_gpu"] for row in rows))  # room for the figures above the bars
    axes.spines[["top", "right"]].set_visible(False)
