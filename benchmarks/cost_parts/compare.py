"""Predicted beside measured, with the error: attention rows of benchmarks/attention.py, and whole steps of others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyctx.cost.attention import AttentionCost, attention_cost
from easyctx.cost.hardware import GIB, Cluster, Device, find_device
from easyctx.cost.kernels import KernelRates, fit, kernel_rates
from easyctx.cost.models import load_shape_config, windows_of
from easyctx.cost.stages import OUTSIDE, Passes, Shape, causal_pairs
from easyctx.cost.step import Step, step_cost
from easyctx.memory.budget import Choices, LayerChoice, MemoryShape, Setting, predict
from easyctx.mesh import divisors
from easyctx.modes import MODES

Row = dict[str, Any]
REFERENCE_STEPS = Path(__file__).parent / "reference_steps.json"
WINDOW = 4096  # what benchmarks/attention.py takes where a row does not say
LOCAL = "local kernel"


def compare_attention(path: Path, passes: Passes | None, calibrate: bool) -> list[Row]:
    """A row for each measured one of a mode: both times and the error; what is not modelled says why.

    calibrate: take the kernels' rates from the local rows of the same file instead of the table's, so that the error
        is that of messages, overlap and memory passes alone.

    Raises ValueError for a file that holds no attention results.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or "rows" not in record or "hardware" not in record:
        raise ValueError(f"{path} has no rows and hardware: give a result file of benchmarks/attention.py")
    device = find_device(record["hardware"].split("x", 1)[-1].replace("-", " "))
    found = []
    for row in record["rows"]:
        if row.get("method") not in MODES or "error_message" in row or "ms" not in row:
            continue
        ranks = row.get("ranks", row["gpus"])
        described = {name: row[name] for name in ("method", "kernel", "mask", "q_heads", "kv_heads", "tokens_per_gpu")}
        described |= {"ranks": ranks, "transport": row.get("transport", "links")}
        try:
            rates = _rates(record["rows"], row, device) if calibrate else kernel_rates(device, row["kernel"])
            predicted = _predict(row, ranks, device, rates, passes)
        except ValueError as error:
            found.append(described | {"not_predicted": str(error)})
            continue
        for name, cost in predicted.items():
            measured = row.get(f"{name}_ms", row["ms"]) if name != "both" else row["ms"]
            ms = {"pass": name, "measured_ms": measured, "predicted_ms": cost.seconds * 1e3}
            found.append(described | ms | {"error": cost.seconds * 1e3 / measured - 1, "predicted_share": cost.share})
    return found


def _predict(
    row: Row, ranks: int, device: Device, rates: KernelRates, passes: Passes | None
) -> dict[str, AttentionCost]:
    """By pass: those that the row has figures for."""
    if row["mask"] == "packed":
        raise ValueError("documents are not modelled")
    if row.get("transport") == "loopback":  # messages that go nowhere take no time
        device = replace(device, nvlink_rate=1e30, nvlink_start=0.0)
    window = row.get("window", WINDOW) if row["mask"] == "window" else None
    shape = Shape(row["tokens_per_gpu"], row["q_heads"], row["kv_heads"], row.get("head_dim", 128), window)
    mode, cluster = MODES[row["method"]], Cluster(device, ranks, row.get("nodes", 1))
    degree = row.get("ring_degree", divisors(ranks)[1]) if mode.over == "both" else None

    def cost(backward: bool) -> AttentionCost:
        return attention_cost(mode, shape, cluster, backward=backward, ring_degree=degree, kernel=rates, passes=passes)

    named = {"forward": cost(False), "backward": cost(True)}
    if row.get("pass") in named:
        return {row["pass"]: named[row["pass"]]}
    have = [name for name in named if f"{name}_ms" in row]
    return {"both": named["forward"] + named["backward"]} | {name: named[name] for name in have}


def _rates(rows: list[Row], row: Row, device: Device) -> KernelRates:
    """Curves through the local rows of this kernel and these heads."""
    same = [
        r
        for r in rows
        if r.get("method") == LOCAL
        and "forward_ms" in r
        and "error_message" not in r
        and all(r[name] == row[name] for name in ("kernel", "q_heads", "kv_heads"))
    ]
    points: dict[int, tuple[float, float]] = {}
    for r in same:
        tokens = r.get("local_tokens", r["tokens_per_gpu"])
        flops = causal_pairs(tokens, None) * r["q_heads"] * r.get("head_dim", 128)
        points[tokens] = (4e3 * flops / r["forward_ms"], 10e3 * flops / r["backward_ms"])
    if len(points) < 2:
        raise ValueError(f"{len(points)} local rows of {row['kernel']}: calibrating takes two lengths")
    table = kernel_rates(device, row["kernel"])
    forward, backward = (fit([(tokens / 2, rates[i]) for tokens, rates in points.items()]) for i in (0, 1))
    return replace(
        table,
        forward=replace(forward, windowed=table.forward.windowed),
        backward=replace(backward, windowed=table.backward.windowed),
        source="local rows of the same file",
    )


def compare_steps() -> list[Row]:
    """The steps that others ran (see the file's `about`) beside what the model predicts for the like of them."""
    found = []
    for row in json.loads(REFERENCE_STEPS.read_text())["rows"]:
        config, _ = load_shape_config(row["model"])
        model = MemoryShape.from_config(config)
        layer = LayerChoice(attention="recompute" if row["recompute"] == "all" else "gpu")
        step = Step(
            model,
            row["seq_length"],
            Cluster(find_device(row["gpu"]), row["gpus"]),
            row["mode"],
            Choices.alike(model.num_layers, layer),
            row.get("engine", "fsdp2"),
            windows=windows_of(config),
            kernel=row["kernel"],
            passes=OUTSIDE,
        )
        predicted = step_cost(step).tokens_per_s
        described = {name: row[name] for name in ("source", "method", "model", "gpu", "gpus", "seq_length")}
        figures = {"tokens_per_s": row["tokens_per_s"], "predicted_tokens_per_s": predicted}
        figures["error"] = predicted / row["tokens_per_s"] - 1
        memory: Row = {"peak_gpu_gib": None, "predicted_peak_gpu_gib": None, "peak_error": None}
        if measured := row.get("peak_gpu_gib"):
            peak = predict(model, _setting(step, row), step.choices).gpu_peak / GIB
            memory = {
                "peak_gpu_gib": measured,
                "predicted_peak_gpu_gib": peak,
                "peak_error": peak / measured - 1,
            }
        found.append(described | figures | memory | {"fitted": row.get("fitted", False)})
    return found


def _setting(step: Step, row: Row) -> Setting:
    is_ring = MODES[step.mode].over == "ring"
    gpus = step.cluster.gpus
    ring, ulysses = (gpus, 1) if is_ring else (1, gpus)
    return Setting(step.local_tokens, step.engine, gpus, gpus, ring, ulysses, kernel=row["kernel"], widths=step.widths)
