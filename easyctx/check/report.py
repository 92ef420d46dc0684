"""A check's result as a table and as JSON."""

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from easyctx.check.compare import GradientError, as_json
from easyctx.check.run import Result, Subject
from easyctx.check.settings import ROWS
from easyctx.environment import hardware, versions

WORST_SHOWN = 5


def describe(subject: Subject) -> list[str]:
    """What is going to be compared, line by line."""
    s, small, layer = subject.settings, subject.small, subject.layers[0]
    ring = f" (ring {s.ring_degree})" if s.ring_degree else ""
    where = "GPUs, NCCL" if subject.device_type == "cuda" else "CPU processes, gloo"
    rows = s.steps * s.accumulate * s.dp
    lines = [
        f"easyctx check: {subject.config.model_type} from {subject.origin}",
        _line("runs", f"{s.parallel_mode}, SP {s.sp}{ring} x DP {s.dp} on {s.world_size} {where}, {s.dtype}"),
        _line("against", f"one process, whole sequences, the stock model with its {subject.attention} attention"),
        _line(
            "model",
            f"{len(small.layers)} of {subject.config.num_hidden_layers} layers, {layer.q_heads} query and "
            f"{layer.kv_heads} key/value heads x {layer.head_dim}, RoPE {_rope(small.config)}; random weights",
        ),
        *(_line("", note) for note in small.notes),
        *_layer_lines(subject),
        _line(
            "data",
            f"{s.steps} SGD steps x {s.accumulate} micro-batches x DP {s.dp}: {rows} batches of {ROWS} rows of "
            f"{small.seq_length} tokens, ragged -100 masks",
        ),
    ]
    if s.packed:
        lines.append(_line("", "each row cut into 4 documents, which the one process runs each alone"))
    return lines


def outcome(result: Result) -> list[str]:
    """Kernels, losses, the worst gradients and the verdict, line by line."""
    comparison, half = result.comparison, result.subject.settings.is_half
    lines = [_line("kernels", _kernels(result.kernels)), ""]
    lines += _table(
        ["step", "loss, one process", "loss, sharded", "relative error", "limit"],
        [
            [f"{x.step}", f"{x.one_process:.10g}", f"{x.sharded:.10g}", f"{x.error:.1e}", f"{x.limit:.1e}"]
            for x in comparison.losses
        ],
    )
    lines.append("")
    shown = comparison.gradients[:WORST_SHOWN]
    header = ["gradient (worst first)", "step", "relative error", *(["one device's"] if half else []), "limit"]
    lines += _table(header, [_gradient_row(e, half) for e in (*shown, comparison.whole)])
    left = len(comparison.gradients) - len(shown)
    if left > 0:
        lines.append(f"and {left} parameters with smaller errors")
    return [*lines, "", verdict(result)]


def verdict(result: Result) -> str:
    """One line."""
    comparison, settings = result.comparison, result.subject.settings
    loss = max(comparison.losses, key=lambda x: x.error if x.error == x.error else float("inf"))
    worst = comparison.gradients[0]
    how = f"{settings.limit:g} times one device's" if settings.is_half else f"{settings.limit:g}"
    figures = f"worst loss error {loss.error:.1e}, worst gradient error {worst.error:.1e} ({worst.name}), limit {how}"
    if result.holds:
        return f"EXACT within tolerance: {figures} ({result.seconds:.1f} s)"
    return f"NOT EXACT: {figures} ({result.seconds:.1f} s)"


def result_json(result: Result) -> dict[str, Any]:
    """The whole result; numbers that are not finite are null."""
    comparison = result.comparison
    found: dict[str, Any] = as_json(
        {
            **_head(result.subject),
            "refused": [],
            "kernels": result.kernels,
            "losses": [asdict(x) | {"holds": x.holds} for x in comparison.losses],
            "gradients": [asdict(x) | {"holds": x.holds} for x in comparison.gradients],
            "whole_gradient": asdict(comparison.whole) | {"holds": comparison.whole.holds},
            "worst_loss_error": max(x.error for x in comparison.losses),
            "worst_gradient_error": comparison.gradients[0].error,
            "limit": result.subject.settings.limit,
            "seconds": round(result.seconds, 2),
            "verdict": "exact" if result.holds else "not exact",
        }
    )
    return found


def refusal_json(settings: dict[str, Any], refusal: str) -> dict[str, Any]:
    """What is left of a check that easyctx refused."""
    return {**_origin(), "settings": settings, "refused": [refusal], "verdict": "refused"}


def _head(subject: Subject) -> dict[str, Any]:
    small, config = subject.small, subject.config
    return {
        **_origin(),
        "settings": asdict(subject.settings),
        "device": subject.device_type,
        "model": {
            "origin": subject.origin,
            "family": config.model_type,
            "layers": config.num_hidden_layers,
            "layers_kept": small.layers,
            "hidden_size": small.config.hidden_size,
            "rope": _rope(small.config),
            "one_process_attention": subject.attention,
            "seq_length": small.seq_length,
            "notes": small.notes,
        },
        "attention_layers": [
            layer.as_dict() | {"original_index": kept} for layer, kept in zip(subject.layers, small.layers, strict=True)
        ],
    }


def _origin() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"check": "easyctx check", "date": now, "hardware": hardware(), "versions": versions()}


def _rope(config: Any) -> str:
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        return f"{rope['rope_type']} (base {rope.get('rope_theta', 0):g})"
    kinds = [f"{r['rope_type']} (base {r.get('rope_theta', 0):g}) in {n}" for n, r in rope.items() if "rope_type" in r]
    return ", ".join(kinds) or "none"


def _layer_lines(subject: Subject) -> list[str]:
    counts = Counter(layer.mask for layer in subject.layers)
    return [_line("attention" if i == 0 else "", f"{n} x {mask}") for i, (mask, n) in enumerate(counts.items())]


def _kernels(kernels: dict[str, dict[str, int]]) -> str:
    named = [f"{n} ({c['forward']:,} forward, {c['backward']:,} backward blocks)" for n, c in kernels.items()]
    return ", ".join(named) or "the model's own attention"


def _gradient_row(error: GradientError, half: bool) -> list[str]:
    own = [f"{error.one_process_error:.1e}"] if half else []
    return [error.name, f"{error.step}", f"{error.error:.1e}", *own, f"{error.limit:.1e}"]


def _line(name: str, text: str) -> str:
    return f"  {name:<10} {text}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first is flush left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
