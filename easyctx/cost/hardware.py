"""Devices and links: how fast they compute, read memory and send, each number with where it comes from.

Units: FLOP/s (bfloat16, dense), bytes, bytes/s in one direction, seconds.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIGA, TERA = 1e9, 1e12
GIB = 1 << 30

H200_RUN = "measured on H200 (torch 2.11, CUDA 13, NCCL), 2026-11"
# Of two messages, 32 MiB at 214 GB/s and 512 MiB at 354 GB/s a direction between two H200: a start-up time and a rate.
NVLINK_SHARE, NVLINK_START = 370 / 450, 66e-6
# A dense bfloat16 product reaches about 790 TFLOP/s on an H200, whose datasheet says 989.
GEMM_SHARE = 790 / 989.4
ASSUMED = {"memory_share": "assumed", "network_start": "assumed", "host_memory_rate": "assumed: a two-socket server"}


@dataclass(frozen=True)
class Link:
    """One message of b bytes takes `start + b / rate` seconds."""

    rate: float
    start: float

    def seconds(self, num_bytes: float) -> float:
        """0 for a message of 0 bytes, which is not sent."""
        return self.start + num_bytes / self.rate if num_bytes else 0.0


@dataclass(frozen=True)
class Device:
    """A GPU, its share of the host and its links.

    family: which attention kernels run on it (`kernels.py`).
    dense_flops: the datasheet's bfloat16 rate without sparsity. gemm_share, memory_share: how much of the
        datasheet's rates large products and streaming passes reach.
    host_rate: pinned copies to or from the host, each way at once. host_memory_rate: of the host's own memory, shared
        by all GPUs of a node.
    nvlink_rate, network_rate: to another GPU of the node, and of another node (a GPU's own share of its adapters).
    sources: where the numbers come from, by field.
    """

    name: str
    family: str
    memory_bytes: float
    dense_flops: float
    memory_rate: float
    host_rate: float
    nvlink_rate: float
    network_rate: float
    nvlink_start: float = NVLINK_START
    network_start: float = NVLINK_START
    gemm_share: float = GEMM_SHARE
    memory_share: float = 0.85
    host_memory_rate: float = 200 * GIGA
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def gemm_flops(self) -> float:
        return self.dense_flops * self.gemm_share

    @property
    def streaming_rate(self) -> float:
        """Bytes/s of memory that passes over tensors reach."""
        return self.memory_rate * self.memory_share

    @property
    def nvlink(self) -> Link:
        return Link(self.nvlink_rate, self.nvlink_start)

    @property
    def network(self) -> Link:
        return Link(self.network_rate, self.network_start)


def _device(name: str, family: str, gib: float, tflops: float, tb_s: float, **rates: Any) -> Device:
    """From the memory that PyTorch finds (GiB) and datasheet numbers in TFLOP/s, TB/s, and GB/s one way.

    rates: `host`, `nvlink`, `network`, and how they differ from the usual.
    """
    host, nvlink, network = rates["host"], rates["nvlink"], rates["network"]
    sources = {
        "memory_bytes": "total capacity in PyTorch's out-of-memory messages",
        "dense_flops": "datasheet",
        "memory_rate": "datasheet",
        "nvlink_rate": rates.get("nvlink_from", f"datasheet x {NVLINK_SHARE:.2f}, the share that an H200 reached"),
        "nvlink_start": f"assumed as {H200_RUN}",
        "host_rate": rates.get("host_from", "datasheet's PCIe x 0.85, the share that an H200 reached"),
        "network_rate": rates.get("network_from", "one adapter a GPU, as in the maker's own servers, x 0.9 (assumed)"),
        "gemm_share": f"assumed as {H200_RUN}",
        **ASSUMED,
    }
    return Device(
        name,
        family,
        memory_bytes=gib * GIB,
        dense_flops=tflops * TERA,
        memory_rate=tb_s * TERA,
        host_rate=host * 0.85 * GIGA,
        nvlink_rate=nvlink * rates.get("nvlink_share", NVLINK_SHARE) * GIGA,
        network_rate=network * 0.9 * GIGA,
        sources=sources,
    )


_NO_NVLINK = {"nvlink_share": 0.8, "nvlink_from": "no NVLink: PCIe x 0.8 (assumed)"}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("h100", "hopper", 79.1, 989.4, 3.35, host=64, nvlink=450, network=50),
        _device("h200", "hopper", 139.8, 989.4, 4.8, host=64, nvlink=450, network=50),
        _device("b200", "blackwell", 178.4, 2250, 8.0, host=64, nvlink=900, network=50),
        _device("a100-80gb", "ampere", 79.2, 312, 2.039, host=32, nvlink=300, network=25),
        _device("a100-40gb", "ampere", 39.4, 312, 1.555, host=32, nvlink=300, network=25),
        _device("l40s", "ada", 44.4, 362, 0.864, host=32, nvlink=32, network=12.5, **_NO_NVLINK),
        _device("rtx4090", "ada", 23.6, 165.2, 1.008, host=32, nvlink=32, network=3, **_NO_NVLINK),
    )
}
_MEASURED_H200 = {
    "nvlink_rate": f"{H200_RUN}: 214 GB/s at 32 MiB, 354 GB/s at 512 MiB",
    "nvlink_start": H200_RUN,
    "host_rate": f"{H200_RUN}: 54 GB/s each way",
    "gemm_share": f"{H200_RUN}: about 790 TFLOP/s",
}
DEVICES["h200"] = dataclasses.replace(
    DEVICES["h200"], host_rate=54 * GIGA, sources={**DEVICES["h200"].sources, **_MEASURED_H200}
)
_ALIASES = {"a100": "a100-80gb", "4090": "rtx4090", "rtx-4090": "rtx4090"}


def find_device(name: str) -> Device:
    """The device of that name ("h100"), or of what torch calls it ("NVIDIA H100 80GB HBM3").

    Raises ValueError, with all names, for one that is not in the table.
    """
    wanted = name.lower().removeprefix("nvidia").strip(" -").replace("geforce ", "").replace("rtx ", "rtx")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted in DEVICES:
        return DEVICES[wanted]
    if wanted.startswith("a100"):
        return DEVICES["a100-40gb" if "40gb" in wanted else "a100-80gb"]
    for known, device in DEVICES.items():
        if wanted.split(" ")[0].split("-")[0] == known:
            return device
    raise ValueError(f"no rates are known for GPU {name!r}: choose one of {', '.join(DEVICES)}")


def load_rates(device: Device, path: str) -> Device:
    """The device with the numbers of a JSON file in place of its own: an object of the fields of `Device`.

    Raises ValueError for a file that is none, a field that does not exist, or a rate that is not positive.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--rates {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"--rates {path} holds a {type(values).__name__}: make it an object such as {{'nvlink_rate': 3e11}}"
        )
    known = [f.name for f in dataclasses.fields(Device) if f.type is float or f.type == "float"]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"--rates {path} has {name!r}, which is no rate: {', '.join(known)}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"--rates {path} has {name} = {value!r}: give a positive number")
    sources = {**device.sources, **dict.fromkeys(values, f"given in {path}")}
    return dataclasses.replace(device, **values, sources=sources)


@dataclass(frozen=True)
class Cluster:
    """The GPUs that share one sequence. Neighbouring ranks are on one node.

    Raises ValueError if they do not divide into the nodes.
    """

    device: Device
    gpus: int
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(
                f"{self.gpus} GPUs do not divide into {self.nodes} nodes: make the GPUs a multiple of them"
            )

    @classmethod
    def of(cls, device: Device, gpus: int, per_node: int) -> "Cluster":
        """`gpus` neighbouring ranks of nodes with `per_node` GPUs, on as few nodes as hold and divide them."""
        return cls(device, gpus, next(n for n in range(1, gpus + 1) if gpus % n == 0 and n * per_node >= gpus))

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes

    def ring_link(self, ring_size: int) -> Link:
        """The slowest link that a hop of a ring crosses: its ranks wait for each other."""
        alone = ring_size == 1 or self.nodes == 1
        return self.device.nvlink if alone else self.device.network

    def all_to_all_seconds(self, degree: int, bytes_to_each: float) -> float:
        """An all-to-all among `degree` neighbouring ranks; both kinds of links work at once."""
        near = min(degree, self.gpus_per_node)
        if self.gpus_per_node % near:  # groups that straddle two nodes
            near = 1
        inside = self.device.nvlink.seconds((near - 1) * bytes_to_each)
        outside = self.device.network.seconds((degree - near) * bytes_to_each)
        return max(inside, outside)
