"""How fast attention kernels are, by kernel, direction and how many keys a query meets: curves through measured points.

A block of `pairs` query-key pairs over `rows` queries gives each query m = pairs / rows keys on average. What a kernel
spends on a query whatever its keys (loading it, its masked tile, writing its result) makes short blocks slower:

    seconds = FLOPs / limit * (1 + half / m),    so that a block of m = half runs at half the limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from easyctx.cost.hardware import TERA, Device

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # a pair, head and unit of head dim: 2 products of 2 FLOPs, then 5
MEASURED = "measured on one H200 (torch 2.11, cuDNN 9.19, flash-attn-4 4.0.0b36), bfloat16, 32 heads of 128, 2026-11"

# kernel -> (tokens, causal forward TFLOP/s, causal backward TFLOP/s); FLOPs of causal pairs counted once.
POINTS: dict[str, tuple[tuple[int, float, float], ...]] = {
    "flash4": ((8192, 711, 549), (32768, 655, 625), (65536, 671, 611)),
    "cudnn": ((8192, 555, 480), (131072, 562, 526)),
    "torch_flash": ((8192, 313, 282), (98304, 325, 321)),
}
# A window of 4,096 in 65,536 tokens through flash-attn-4: 616 and 549. The same keys a query as causal 8,192.
WINDOW_POINT = (4096, 616, 549)
# Published shares of the datasheet where nothing was measured here: (forward, backward, source).
PUBLISHED: dict[tuple[str, str], tuple[float, float, str]] = {
    ("torch_flash", "ampere"): (0.73, 0.63, "published (FlashAttention-2, arXiv 2307.08691), A100, at best"),
    ("torch_flash", "ada"): (0.73, 0.63, "assumed as published for A100 (arXiv 2307.08691)"),
    ("flash4", "blackwell"): (0.71, 0.71 * 0.92, "published (FlashAttention-4), B200, forward; backward in proportion"),
}
KERNEL_OF_FAMILY = {"hopper": "flash4", "blackwell": "flash4", "ampere": "torch_flash", "ada": "torch_flash"}


@dataclass(frozen=True)
class Curve:
    """`limit`: FLOP/s of long blocks. `half`: keys a query at which half of it is reached. `windowed`: share of the
    curve that a block with a window's two edges reaches."""

    limit: float
    half: float = 0.0
    windowed: float = 1.0

    def rate(self, keys_per_query: float, *, windowed: bool = False) -> float:
        return self.limit * keys_per_query / (keys_per_query + self.half) * (self.windowed if windowed else 1.0)


@dataclass(frozen=True)
class KernelRates:
    """A kernel on a device, and where its curves come from."""

    name: str
    forward: Curve
    backward: Curve
    source: str

    def seconds(self, rows: float, pairs: float, heads: int, head_dim: int, *, backward: bool, windowed: bool) -> float:
        """Of one block, for all heads."""
        if not pairs:
            return 0.0
        curve = self.backward if backward else self.forward
        return flops(pairs, heads, head_dim, backward=backward) / curve.rate(pairs / rows, windowed=windowed)


def flops(pairs: float, heads: int, head_dim: int, *, backward: bool) -> float:
    """FLOPs of attention over so many query-key pairs; the backward makes the scores again."""
    return pairs * heads * head_dim * (BACKWARD_FLOPS if backward else FORWARD_FLOPS)


def fit(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve through (keys a query, FLOP/s), by least squares in seconds a FLOP; a `half` below 0 is made 0."""
    inverse_keys = [1 / keys for keys, _ in points]
    seconds = [1 / rate for _, rate in points]
    mean_x, mean_y = sum(inverse_keys) / len(points), sum(seconds) / len(points)
    spread = sum((x - mean_x) ** 2 for x in inverse_keys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(inverse_keys, seconds, strict=True))
    slope = max(products / spread, 0.0) if spread else 0.0
    return Curve(1 / (mean_y - slope * mean_x), slope / (mean_y - slope * mean_x))


@cache
def _on_h200(kernel: str) -> tuple[Curve, Curve]:
    forward, backward = (fit([(p[0] / 2, p[column] * TERA) for p in POINTS[kernel]]) for column in (1, 2))
    if kernel == "flash4":
        keys, *rates = WINDOW_POINT
        share = [rate * TERA / curve.rate(keys) for rate, curve in zip(rates, (forward, backward), strict=True)]
        forward = Curve(forward.limit, forward.half, min(share[0], 1.0))
        backward = Curve(backward.limit, backward.half, min(share[1], 1.0))
    return forward, backward


def kernel_rates(device: Device, kernel: str = "auto") -> KernelRates:
    """The curves of a kernel on a device; "auto" takes the fastest that the device's family runs.

    Raises ValueError for a kernel that nothing is known of.
    """
    name = KERNEL_OF_FAMILY[device.family] if kernel == "auto" else kernel
    if name not in POINTS:
        raise ValueError(
            f"no rates are known for attention kernel {kernel!r}: choose auto or one of {', '.join(POINTS)}"
        )
    if name == "flash4" and KERNEL_OF_FAMILY[device.family] != name:
        raise ValueError(
            f"attention kernel flash4 runs on Hopper and Blackwell GPUs, and {device.name} is none: choose auto, cudnn "
            "or torch_flash"
        )
    forward, backward = _on_h200(name)
    source = MEASURED
    if published := PUBLISHED.get((name, device.family)):
        limits, source = (published[0] * device.dense_flops, published[1] * device.dense_flops), published[2]
        forward = Curve(limits[0], forward.half, forward.windowed)
        backward = Curve(limits[1], backward.half, backward.windowed)
    elif not math.isclose(device.dense_flops, 989.4 * TERA):
        share = device.dense_flops / (989.4 * TERA)
        forward = Curve(forward.limit * share, forward.half, forward.windowed)
        backward = Curve(backward.limit * share, backward.half, backward.windowed)
        source = f"in proportion to the datasheet's rate, {MEASURED}"
    elif device.name != "h200":
        source = f"assumed as {MEASURED}"
    return KernelRates(name, forward, backward, source)
