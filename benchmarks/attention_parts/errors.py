"""What the error benchmarks share: tensors, masks, float64 truth, and one device's own error to compare with."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Kernel, Saved, Score, Workload
from easyctx.layout import CONTIGUOUS
from easyctx.mask import Mask
from easyctx.schedule import Attention, Ring

Tensors = tuple[torch.Tensor, ...]
NAMES = ("out", "dq", "dk", "dv")
MASKS = ("causal", "window", "packed", "window+packed")
HALF_AND_SINGLE = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser, masks: Sequence[str], dtypes: Sequence[str]) -> None:
    """Sizes, masks (default: `masks`) and dtype of the attention, and where results go."""
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--masks", nargs="+", default=masks, choices=MASKS)
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")


def random_tensors(
    length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensors:
    """q, k, v and dout of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return tuple(
        torch.randn(1, length, count, head_dim, generator=generator).to(device=device, dtype=dtype) for count in counts
    )


def make_mask(name: str, length: int) -> Mask:
    """One of MASKS: windows of about a quarter, a dozen documents of all sizes."""
    window = length // 4 - 24 if "window" in name else None
    cuts = (0, 100, 101, 250, 700, 900, 1500, 1700, 1800, 2500, 3500, 3600)
    documents = Documents(length, (tuple(cut for cut in cuts if cut < length),)) if "packed" in name else None
    return Mask(window, documents)


def work_of(mask: Mask, dtype: torch.dtype, head_dim: int, device: torch.device) -> Workload:
    return Workload(device, dtype, head_dim, mask.window is not None, packed=mask.documents is not None)


def on_one_device(kernel: Kernel, tensors: Tensors, mask: Mask, dtype: torch.dtype) -> Tensors:
    """out, dq, dk, dv of the kernel over the whole sequence, in the dtype, as a user gets them."""
    q, k, v, dout = (t.to(dtype) for t in tensors)
    call = Attention(CONTIGUOUS, kernel, Score(q.shape[-1] ** -0.5), mask)
    out, lse = Ring().forward(q, k, v, call)
    out = out.to(dtype)
    return tuple(t.to(dtype) for t in (out, *Ring().backward(dout, Saved(q, k, v, out, lse), call)))


def truth(tensors: Tensors, mask: Mask) -> Tensors:
    """The same in float64."""
    return on_one_device(KERNELS["tiled"], tensors, mask, torch.float64)


def errors(got: Tensors, want: Tensors) -> dict[str, float]:
    """Relative errors (Frobenius norm)."""
    pairs = zip(NAMES, got, want, strict=True)
    return {name: float((g.double() - w).norm() / w.norm()) for name, g, w in pairs}


def error_columns(found: dict[str, float], local: dict[str, float]) -> dict[str, float]:
    return {f"{name}_error": found[name] for name in NAMES} | {
        f"{name}_over_local": found[name] / max(local[name], 1e-300) for name in NAMES
    }
