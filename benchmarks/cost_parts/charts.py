"""Charts of the cost model: which mode to take when, and what share of the kernel's rate each mode keeps."""

import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {
    "zigzag_ring_attn": "#2a788e",
    "usp_attn": "#e08214",
    "ulysses_attn": "#b2182b",
    "dist_flash_attn": "#7a5195",
    "striped_attn": "#5aae61",
    "ring_attn": "#878787",
}


def draw_choice(rows: list[Row], path: Path, title: str) -> None:
    """A panel for each head count and mask: GPUs down, tokens a GPU across, coloured by the chosen mode."""
    plt = _pyplot()
    panels = list(dict.fromkeys((r["q_heads"], r["kv_heads"], r["window"]) for r in rows))
    figure, grid = plt.subplots(
        1, len(panels), figsize=(1.2 + 4.9 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        of_panel = [r for r in rows if (r["q_heads"], r["kv_heads"], r["window"]) == panel and r["chosen"]]
        _cells(plt, axes, of_panel)
        mask = f"window {panel[2]:,}" if panel[2] else "causal"
        axes.set_title(f"{panel[0]} query, {panel[1]} key/value heads, {mask}", fontsize=10)
    chosen = [mode for mode in COLOURS if any(r["chosen"] and r["method"] == mode for r in rows)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[mode]) for mode in chosen]
    figure.legend(handles, chosen, loc="outside lower center", ncols=len(chosen), frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(plt, figure, path)


def _cells(plt: Any, axes: Any, rows: list[Row]) -> None:
    lengths = sorted({r["tokens_per_gpu"] for r in rows})
    sizes = sorted({r["gpus"] for r in rows})
    for row in rows:
        x, y = lengths.index(row["tokens_per_gpu"]), sizes.index(row["gpus"])
        axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=COLOURS[row["method"]], ec="white", lw=1.5))
        degree = f"\nring {row['ring_degree']}" if row["ring_degree"] else ""
        axes.text(x, y, f"{row['predicted_share']:.0%}{degree}", ha="center", va="center", color="white", fontsize=9)
    axes.set_xticks(range(len(lengths)), [_label(n) for n in lengths])
    axes.set_yticks(range(len(sizes)), [f"{n:,}" for n in sizes])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(-0.5, len(sizes) - 0.5)
    axes.set_xlabel("tokens a GPU")
    axes.set_ylabel("GPUs")


def draw_shares(rows: list[Row], path: Path, title: str) -> None:
    """A panel for each length: share of the local kernel's rate over the number of GPUs, a line for each mode."""
    plt = _pyplot()
    lengths = sorted({r["tokens_per_gpu"] for r in rows})
    figure, grid = plt.subplots(
        1, len(lengths), figsize=(0.6 + 3.7 * len(lengths), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, length in zip(grid[0], lengths, strict=True):
        for mode, colour in COLOURS.items():
            best: dict[int, float] = {}
            for row in rows:
                if row["tokens_per_gpu"] == length and row["method"] == mode:
                    best[row["gpus"]] = max(best.get(row["gpus"], 0.0), row["predicted_share"])
            style = "--" if mode == "striped_attn" else "-"  # it lies on zigzag_ring_attn's
            sizes = sorted(best)
            axes.plot(sizes, [best[n] for n in sizes], style, marker="o", ms=4, color=colour, label=mode)
        axes.set_xscale("log", base=2)
        sizes = sorted({r["gpus"] for r in rows})
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.minorticks_off()
        axes.set_ylim(0, 1.03)
        axes.set_title(f"{_label(length)} tokens a GPU", fontsize=10)
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("predicted share of the local kernel's rate")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(plt, figure, path)


def _label(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)
