"""Kernels: one block of attention on one device. `get_kernel("auto", work)` chooses and says once what it took."""

import logging
import os
from functools import cache

from easyctx.kernel.base import Gradients, Kernel, Saved, Workload, exact_dtype
from easyctx.kernel.flash4 import Flash4
from easyctx.kernel.reference import Reference
from easyctx.kernel.torch_cpu import TorchCpu
from easyctx.kernel.torch_cuda import Cudnn, TorchFlash

__all__ = ["KERNELS", "KERNEL_CHOICES", "Gradients", "Kernel", "Saved", "Workload", "exact_dtype", "get_kernel"]

logger = logging.getLogger(__name__)

# In the order in which `auto` prefers them; the reference is for tests and only on request.
KERNELS: dict[str, Kernel] = {k.name: k for k in (Flash4(), Cudnn(), TorchFlash(), TorchCpu(), Reference())}
KERNEL_CHOICES = ("auto", *KERNELS)


def get_kernel(name: str, work: Workload) -> Kernel:
    """The kernel called `name`, or the best one for `work` if that is "auto".

    Raises ValueError if the name is unknown or no kernel can do the work, with each one's reason.
    """
    if name == "auto":
        return _choose(work)
    if name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}: choose one of {', '.join(KERNEL_CHOICES)}")
    if reason := KERNELS[name].refuses(work):
        raise ValueError(f"attention kernel {name!r} {reason}; 'auto' picks one that can")
    return KERNELS[name]


@cache
def _choose(work: Workload) -> Kernel:
    reasons: list[str] = []
    for kernel in KERNELS.values():
        reason = kernel.refuses(work) if kernel.name != "reference" else "is for tests: ask for it by name"
        if reason is None:
            _announce(kernel.name, work, reasons)
            return kernel
        reasons.append(f"{kernel.name} {reason}")
    raise ValueError(
        f"no attention kernel for {work.dtype}, head dim {work.head_dim}"
        f"{', sliding window' if work.windowed else ''} on {work.device.type}: {'; '.join(reasons)}"
    )


def _announce(name: str, work: Workload, reasons: list[str]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    mask = "sliding-window" if work.windowed else "causal"
    passed_over = f" ({'; '.join(reasons)})" if reasons and work.device.type == "cuda" else ""
    logger.warning("easyctx: attention kernel for %s %s blocks: %s%s", mask, work.dtype, name, passed_over)
