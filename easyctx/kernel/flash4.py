"""FlashAttention-4 (the `flash-attn-4` wheel, CuTe DSL): the fastest on Hopper and Blackwell; compiles at first use."""

import functools
import importlib.metadata
import importlib.util
import logging
import threading
from functools import cache
from typing import Any

import torch

from easyctx.band import Band
from easyctx.kernel.base import VarlenKernel, Workload
from easyctx.kernel.hopper import COMPILING
from easyctx.kernel.running import RunningGradients, RunningOutput
from easyctx.kernel.torch_cuda import packed_arguments, refuses_on_cuda
from easyctx.kernel.values import Gradients, Saved, Score

logger = logging.getLogger(__name__)

HOPPER_VERSION = "4.0.0b36"
HOPPER_HEAD_DIMS = (64, 128)
KEY_TILE = 128  # keys to a tile of the backward's sums, for these head dims


@cache
def _interface() -> Any:
    import flash_attn.cute.interface as interface

    return interface


@cache
def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


@cache
def _has_hopper_kernels() -> bool:
    """Whether the GPU is a Hopper and the library the one whose kernel classes `hopper/` builds on."""
    if not _is_installed() or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    installed = importlib.metadata.version("flash-attn-4")
    if installed != HOPPER_VERSION:
        logger.warning(
            "easyctx: flash-attn-4 is %s; sums over blocks are kept in its kernels with %s only, so they are made "
            "outside, which is slower and rounds each block's output",
            installed,
            HOPPER_VERSION,
        )
    return installed == HOPPER_VERSION


def keeps_sums(head_dim: int) -> bool:
    """Whether sums over blocks are kept in the kernels themselves on this GPU."""
    return _has_hopper_kernels() and head_dim in HOPPER_HEAD_DIMS


class Flash4(VarlenKernel):
    """`flash_attn.cute`: GQA, windows, documents, softcap."""

    name = "flash4"

    @property
    def key_tile(self) -> int:  # type: ignore[override]
        return KEY_TILE if _has_hopper_kernels() else 1

    def output(self, q_BSHD: torch.Tensor, score: Score, *, unrounded: bool = False) -> RunningOutput:
        if keeps_sums(q_BSHD.shape[-1]):
            from easyctx.kernel.hopper.output import HopperOutput

            return HopperOutput(self, q_BSHD, score, unrounded=unrounded)
        return super().output(q_BSHD, score, unrounded=unrounded)

    def gradients(
        self, dout_BSHD: torch.Tensor, saved: Saved, score: Score, *, unrounded: bool = False
    ) -> RunningGradients:
        if keeps_sums(dout_BSHD.shape[-1]):
            from easyctx.kernel.hopper.gradients import HopperGradients

            return HopperGradients(self, dout_BSHD, saved, score, unrounded=unrounded)
        return super().gradients(dout_BSHD, saved, score, unrounded=unrounded)

    def refuses(self, work: Workload) -> str | None:
        if not _is_installed():
            return "is not installed: pip install flash-attn-4==4.0.0b36"
        if reason := refuses_on_cuda(work, max_head_dim=128):
            return reason
        if torch.cuda.get_device_capability(work.device)[0] not in (9, 10, 11):
            return "needs a Hopper or Blackwell GPU"
        return None

    def forward(
        self, q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(q_BSHD, k_BSKD, v_BSKD, score, **_mask_arguments(band, q_BSHD.shape[1], k_BSKD.shape[1]))

    def backward(self, dout_BSHD: torch.Tensor, saved: Saved, band: Band, score: Score) -> Gradients:
        arguments = _mask_arguments(band, saved.q_BSHD.shape[1], saved.k_BSKD.shape[1])
        return _backward(dout_BSHD, saved, score, **arguments)

    def forward_flat(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: tuple[int, ...], band: Band, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(q, k, v, score, **_packed_arguments(cuts, band, q.device))

    def backward_flat(
        self, dout: torch.Tensor, saved: Saved, cuts: tuple[int, ...], band: Band, score: Score
    ) -> Gradients:
        return _backward(dout, saved, score, **_packed_arguments(cuts, band, dout.device))


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score, **mask: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with COMPILING:
        out, lse, *_ = _interface()._flash_attn_fwd(
            q, k, v, softmax_scale=score.scale, softcap=score.softcap, return_lse=True, **mask
        )
    return out, lse


def _backward(dout: torch.Tensor, saved: Saved, score: Score, **mask: Any) -> Gradients:
    q, k, v, out, lse = saved
    with COMPILING, _UnroundedGradients() as unrounded:
        dq, dk, dv, *_ = _interface()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout.contiguous(),
            lse.contiguous(),
            softmax_scale=score.scale,
            softcap=score.softcap or 0.0,
            **mask,
        )
    return unrounded.of(dq), unrounded.of(dk), unrounded.of(dv)


class _UnroundedGradients:
    """Gives back the float32 sums that the library rounds to half precision at the end of its backward.

    A block's gradients are summed with those of other blocks, and rounding each of them first would cost a ring of
    any size a fifth of its accuracy. The sums lie in an order that only the library's last kernel knows; so that
    kernel is run twice, on the sums' half-precision parts and on what those leave over, and the two are added.
    dk and dv pass through it where query heads share them (GQA); with MHA they come rounded.

    The library's function is replaced once, by one that asks its own thread who collects: autograd has a thread for
    each GPU.
    """

    def __init__(self) -> None:
        self._found: dict[int, torch.Tensor] = {}

    def __enter__(self) -> "_UnroundedGradients":
        _collect_conversions(_interface())
        _thread.collector = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.collector = None

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """The float32 values of a gradient that the library returned, or the gradient itself."""
        return self._found.get(gradient.data_ptr(), gradient)

    def convert(
        self, convert: Any, sums: torch.Tensor, out: torch.Tensor, scale: float, *args: Any, **kwargs: Any
    ) -> None:
        """In place of the library's `convert`, whose arguments these are."""
        sums.mul_(scale)
        head = sums.to(out.dtype).float()
        convert(head, out, 1.0, *args, **kwargs)
        rest = torch.empty_like(out)
        convert(sums.sub_(head), rest, 1.0, *args, **kwargs)
        self._found[out.data_ptr()] = out.float().add_(rest)


_thread = threading.local()


@cache
def _collect_conversions(interface: Any) -> None:
    """Put ourselves before the library's last kernel, for as long as the process lives."""
    original = interface._bwd_postprocess_convert

    @functools.wraps(original)  # also hands on its cache of compiled kernels
    def convert(*args: Any, **kwargs: Any) -> None:
        collector: _UnroundedGradients | None = getattr(_thread, "collector", None)
        if collector is None:
            original(*args, **kwargs)
        else:
            collector.convert(original, *args, **kwargs)

    interface._bwd_postprocess_convert = convert


def _mask_arguments(band: Band, num_queries: int, num_keys: int) -> dict[str, Any]:
    if band.is_full:
        return {"causal": False}
    if band.is_causal and num_queries == num_keys:
        return {"causal": True}
    left, right = band.window(num_queries, num_keys)
    return {"causal": False, "window_size_left": left, "window_size_right": right}


def _packed_arguments(cuts: tuple[int, ...], band: Band, device: torch.device) -> dict[str, Any]:
    cu_seqlens, longest = packed_arguments(cuts, device)
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return lengths | _mask_arguments(band, longest, longest)
