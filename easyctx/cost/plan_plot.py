"""The picture of a plan: predicted memory over the sequence's length, on a GPU and on a host."""

import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from easyctx.cost.hardware import GIB
from easyctx.cost.plan import STEP_OF_LENGTH, Plan, decide_at
from easyctx.evals.plots import pyplot, save_figure
from easyctx.memory.budget import Breakdown
from easyctx.memory.policy import DoesNotFit

POINTS = 12
COLOURS = (
    *("#2a788e", "#5aae61", "#e08214", "#b2182b", "#7a5195", "#878787", "#c7a76c", "#1f4e79", "#d6604d", "#a6dba0"),
    *("#4d4d4d", "#f4a582", "#92c5de"),
)


def draw_plan(plan: Plan, model: str, path: Path) -> None:
    """Stacked terms at lengths up to the longest that fits, each with the choices made for it."""
    lengths = _lengths(plan)
    found: list[tuple[int, Breakdown]] = []
    for length in tqdm(lengths, desc="lengths", leave=False):
        try:
            found.append((length, decide_at(plan.request, plan.mode, plan.ring_degree, length).predicted))
        except DoesNotFit:
            continue
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    request = plan.request
    names = dict.fromkeys(name for _, b in found for name in (*b.gpu, *b.host))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    _stack(panels[0], [(n, b.gpu) for n, b in found], colours, "of a GPU", request.gpu_memory)
    _stack(panels[1], [(n, b.host) for n, b in found], colours, "of a host", request.host_memory)
    for axes in panels:
        if plan.longest:
            axes.axvline(plan.longest, color="black", lw=1, ls=":")
        if plan.length != plan.longest:
            axes.axvline(plan.length, color="#b2182b", lw=1.2, ls="--")
    where = f"{request.gpus} x {request.device.name}, {request.engine}, {plan.mode}"
    figure.suptitle(f"{model} on {where}: predicted memory by sequence length (longest {plan.longest:,} tokens)")
    save_figure(plt, figure, path)


def _lengths(plan: Plan) -> list[int]:
    """From 4,096 tokens a GPU up to the longest, in equal ratios, and the length that was asked for."""
    unit = STEP_OF_LENGTH * plan.request.sharing
    first, last = 4 * unit, max(plan.longest, 4 * unit)
    ratio = math.log(last / first) / (POINTS - 1)
    steps = {round(first * math.exp(ratio * i) / unit) * unit for i in range(POINTS)}
    return sorted({*steps, min(plan.length, last), last})


def _stack(
    axes: Any, points: list[tuple[int, dict[str, int]]], colours: dict[str, str], what: str, limit: float
) -> None:
    names = list(dict.fromkeys(name for _, terms in points for name in terms))
    heights = [[terms.get(name, 0) / GIB for _, terms in points] for name in names]
    lengths = [length for length, _ in points]
    if points:
        axes.stackplot(lengths, heights, labels=names, colors=[colours[name] for name in names], alpha=0.9)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8, frameon=False)
    axes.axhline(limit / GIB, color="black", lw=1)
    axes.text(
        0.01, limit / GIB, f"{limit / GIB:.4g} GiB ", ha="left", va="bottom", transform=axes.get_yaxis_transform()
    )
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(10, 40) if lengths and lengths[0] <= 2**i <= 1.05 * lengths[-1]]
    axes.set_xticks(ticks, [f"{t >> 10}K" if t < 1 << 20 else f"{t >> 20}M" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * limit / GIB)
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel(f"GiB {what}")
    axes.spines[["top", "right"]].set_visible(False)
