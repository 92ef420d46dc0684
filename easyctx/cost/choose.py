"""Which mode to take: the one with the least predicted time for a layer's attention; `--parallel_mode auto`."""

import importlib.util
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from easyctx.cost.attention import AttentionCost, attention_cost, is_described
from easyctx.cost.hardware import Cluster, Device, find_device
from easyctx.cost.kernels import KERNEL_OF_FAMILY, POINTS
from easyctx.cost.models import windows_of
from easyctx.cost.stages import Passes, Shape
from easyctx.mesh import check_sp_degree, divisors
from easyctx.modes import MODES, Mode, get_mode

AUTO = "auto"
# The first of those that are close to the fastest is taken: less to go wrong, and any heads.
PREFERENCE = ("zigzag_ring_attn", "ring_attn", "ulysses_attn", "usp_attn", "dist_flash_attn", "striped_attn")
CLOSE = 1.05  # about the model's own error
DEFAULT_DEVICE = "h100"


@dataclass(frozen=True)
class Candidate:
    """A mode that can run, and what it costs: all layers' attention, forward and backward (evals: forward)."""

    mode: str
    ring_degree: int | None
    cost: AttentionCost

    def __str__(self) -> str:
        return self.mode + (f" (ring degree {self.ring_degree})" if self.ring_degree else "")


def candidates(
    shape: Shape,
    cluster: Cluster,
    windows: Mapping[int | None, int],
    *,
    ring_degree: int | None = None,
    forward_only: bool = False,
    kernel: str = "auto",
    passes: Passes | None = None,
    modes: Collection[str] = tuple(MODES),
) -> list[Candidate]:
    """Every sequence-parallel mode that takes these heads and degrees, fastest first.

    Args:
        shape: of one layer on one GPU; its window is not looked at.
        windows: layers by their window.
        modes: to choose from.
    """
    found = []
    for mode in (get_mode(name) for name in modes):
        for degree in _ring_degrees(mode, ring_degree, cluster.gpus):
            if not _can_run(mode, shape, cluster.gpus, degree):
                continue
            cost = AttentionCost(0, 0, 0, 0, 0, 0)
            for window, layers in windows.items():
                layer = Shape(shape.tokens, shape.q_heads, shape.kv_heads, shape.head_dim, window, shape.batch)
                for backward in (False,) if forward_only else (False, True):
                    one = attention_cost(
                        mode,
                        layer,
                        cluster,
                        backward=backward,
                        ring_degree=degree,
                        kernel=kernel,
                        passes=passes,
                    )
                    cost = cost + one.times(layers)
            found.append(Candidate(mode.name, degree, cost))
    return sorted(found, key=lambda candidate: candidate.cost.seconds)


def best(found: list[Candidate]) -> Candidate:
    """The most preferred mode among those that are close to the fastest; of a mode's ring degrees the fastest."""
    close = [c for c in found if c.cost.seconds <= CLOSE * found[0].cost.seconds]
    ranks = {name: place for place, name in enumerate(PREFERENCE)}
    return min(close, key=lambda c: (ranks.get(c.mode, len(ranks)), c.cost.seconds))


def _ring_degrees(mode: Mode, given: int | None, size: int) -> list[int | None]:
    if given is not None or mode.over != "both":
        return [given]
    return [degree for degree in divisors(size) if 1 < degree < size]


def _can_run(mode: Mode, shape: Shape, size: int, ring_degree: int | None) -> bool:
    if not (mode.is_sequence_parallel and is_described(mode)):
        return False
    try:
        mode.check_heads(shape.q_heads, shape.kv_heads, size, ring_degree)
    except ValueError:
        return False
    return True


def resolve_mode(
    model: str,
    seq_length: int,
    world_size: int,
    sp_degree: int | None,
    ring_degree: int | None,
    *,
    batch: int = 1,
    forward_only: bool = False,
    kernel: str = "auto",
    modes: Collection[str] = tuple(MODES),
) -> tuple[str, int | None]:
    """The mode and ring degree that `--parallel_mode auto` stands for in this launch; the first rank says why.

    Args:
        modes: to choose from, where not all will do (those of a third-party backend).

    Raises ValueError for a degree that does not divide the processes and a model whose configuration is not there.
    Whether the mode computes the model's attention exactly is left to the checks that follow.
    """
    degree = check_sp_degree(sp_degree, world_size)
    if degree == 1:
        _say(f"data_parallel: {'one process' if world_size == 1 else 'no processes share a sequence'}")
        return "data_parallel", ring_degree
    text = _text_config(model)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return PREFERENCE[0], ring_degree
    device, note = device_here()
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    cluster = Cluster.of(device, degree, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    shape = Shape(-(-seq_length // degree), heads, kv_heads, head_dim, batch=batch)
    found = candidates(
        shape,
        cluster,
        windows_of(text),
        ring_degree=ring_degree,
        forward_only=forward_only,
        kernel=_kernel_here(kernel, device),
        modes=modes,
    )
    if not found:  # a ring degree that no mode takes: the checks that follow say so
        return "usp_attn", ring_degree
    chosen = best(found)
    others = ", ".join(f"{c} {c.cost.seconds:.3g} s" for c in [c for c in found if c != chosen][:2])
    _say(
        f"{chosen}: for {heads} query and {kv_heads} key/value heads, {shape.tokens} tokens on each of {degree} "
        f"processes over {cluster.nodes} node{'s' if cluster.nodes > 1 else ''} ({note}), attention of all layers is "
        f"predicted to take {chosen.cost.seconds:.3g} s" + (f"; next {others}" if others else "")
    )
    return chosen.mode, chosen.ring_degree


def device_here() -> tuple[Device, str]:
    """The device of this process, or a stand-in where there is none that is known, and whose rates these are."""
    import torch

    if not torch.cuda.is_available():
        return find_device(DEFAULT_DEVICE), f"no GPU here: rates of {DEFAULT_DEVICE}"
    name = torch.cuda.get_device_name()
    try:
        return find_device(name), f"rates of {find_device(name).name}"
    except ValueError:
        return find_device(DEFAULT_DEVICE), f"{name} is not in the table: rates of {DEFAULT_DEVICE}"


def _kernel_here(kernel: str, device: Device) -> str:
    """The kernel whose rates count: the one asked for, or what `auto` finds installed."""
    if kernel in POINTS:
        return kernel
    fastest = KERNEL_OF_FAMILY[device.family]
    if fastest != "flash4":
        return fastest
    try:
        return fastest if importlib.util.find_spec("flash_attn.cute") else "cudnn"
    except ModuleNotFoundError:
        return "cudnn"


def _text_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    except OSError as error:
        raise ValueError(f"--model {model} could not be loaded: {error}") from error


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"easyctx: --parallel_mode auto takes {text}", flush=True)
