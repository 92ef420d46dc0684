"""Kernels: one block of attention on one device. `get_kernel("auto", work)` chooses and says once what it took."""

import logging
import os
from functools import cache

from easyctx.kernel.base import Kernel, Workload
from easyctx.kernel.flash4 import Flash4
from easyctx.kernel.flash_packages import Flash2, Flash3
from easyctx.kernel.flex import Flex
from easyctx.kernel.reference import Reference
from easyctx.kernel.running import KeyGradients, RunningGradients, RunningOutput
from easyctx.kernel.tiled import Tiled
from easyctx.kernel.torch_cpu import TorchCpu
from easyctx.kernel.torch_cuda import Cudnn, TorchFlash
from easyctx.kernel.values import Gradients, Saved, Score, exact_dtype

__all__ = [
    "KERNELS",
    "KERNEL_CHOICES",
    "Gradients",
    "Kernel",
    "KeyGradients",
    "RunningGradients",
    "RunningOutput",
    "Saved",
    "Score",
    "Workload",
    "exact_dtype",
    "get_kernel",
]

logger = logging.getLogger(__name__)

# In the order in which `auto` prefers them. The tiled one does everything, so the reference after it is only had by
# name. The packages flash-attn-3 and flash-attn have not been run by us (`flash_packages.py`), so each comes after the
# kernels that do the same about as fast or faster. FlashAttention 3 comes after cuDNN, but for the windows and
# documents that cuDNN lacks before PyTorch's FlashAttention 2, which is half as fast on a Hopper GPU; flash-attn 2
# after PyTorch's copy of it, which has no softcaps, and after FlexAttention.
_ORDER = (Flash4(), Cudnn(), Flash3(), TorchFlash(), Flex(), Flash2(), TorchCpu(), Tiled(), Reference())
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ORDER}
KERNEL_CHOICES = ("auto", *KERNELS)


def get_kernel(name: str, work: Workload) -> Kernel:
    """The kernel called `name`, or the best one for `work` if that is "auto".

    Raises ValueError if the name is unknown, or if that kernel cannot do the work, with its reason.
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
        reason = kernel.refuses(work)
        if reason is None:
            _announce(kernel.name, work, reasons)
            return kernel
        reasons.append(f"{kernel.name} {reason}")
    raise AssertionError("the tiled kernel refuses nothing")


def _announce(name: str, work: Workload, reasons: list[str]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    mask = ("softcapped " if work.softcapped else "") + ("sliding-window" if work.windowed else "causal")
    mask += ", packed" if work.packed else ""
    passed_over = f" ({'; '.join(reasons)})" if reasons and work.device.type == "cuda" else ""
    logger.warning("easyctx: attention kernel for %s %s blocks: %s%s", mask, work.dtype, name, passed_over)
