"""The packages `flash-attn` (FlashAttention 2) and `flash-attn-3`, for those who have them installed.

We had no machine with either, so none of their kernels has been run by us. What is called of them are private
functions; so their parameters are looked at when they are imported, and before a package is used for a kind of mask,
its results are held against float64 on a small problem of that kind. A package that fails either is refused, by name.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

from easyctx.kernel.base import Workload
from easyctx.kernel.small_check import disagreement
from easyctx.kernel.torch_cuda import FlashBlocks, FlashMask, Lengths, refuses_on_cuda
from easyctx.kernel.values import Gradients, Saved, Score

LARGEST_HEAD_DIM = 256
TOLERANCE = 2e-2  # relative to float64, in bfloat16: right ones have 3e-3, a wrong mask or scale 1e-1 and more
DENSE = ("_flash_attn_forward", "_flash_attn_backward")
PACKED = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
OF_BACKWARD = ("dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
Arguments = dict[str, Any]


class FlashPackage(FlashBlocks):
    """What both have in common: GQA, windows, documents, softcap, unequal lengths."""

    distribution: str
    module: str
    wanted: str  # versions, in words

    def refuses(self, work: Workload) -> str | None:
        if reason := refuses_on_cuda(work, LARGEST_HEAD_DIM):
            return reason
        return _unusable(self) or self.refuses_gpu(work.device) or _wrong(self, work)

    def refuses_gpu(self, device: torch.device) -> str | None:
        raise NotImplementedError

    def misfit(self, interface: Any) -> str | None:
        """What the imported module lacks of the interface that this class calls."""
        raise NotImplementedError


class Flash2(FlashPackage):
    """`flash_attn.flash_attn_interface`, by the parameters that it has had since 2.7."""

    name = "flash2"
    distribution, module, wanted = "flash-attn", "flash_attn.flash_attn_interface", "2.7 or newer, below 3"

    def refuses_gpu(self, device: torch.device) -> str | None:
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "needs compute capability 8.0 or higher" if old else None

    def misfit(self, interface: Any) -> str | None:
        common = ("q", "k", "v", *_score(Score(1.0)), *_UNUSED2, "causal", "window_size_left", "window_size_right")
        for (forward, backward), lengths in ((DENSE, ()), (PACKED, LENGTHS)):
            given = (*common, *lengths, "return_softmax")
            of_backward = (*common, *lengths, *OF_BACKWARD)
            reason = _misfit(interface, forward, given) or _misfit(interface, backward, of_backward)
            if reason:
                return reason
        return None

    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, mask: FlashMask, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function, given = self._function(0, lengths), _mask(mask) | _score(score) | _UNUSED2
        out, lse, *_ = function(q=q, k=k, v=v, **_lengths(lengths), **given, return_softmax=False)
        return out, lse

    def call_backward(
        self, dout: torch.Tensor, saved: Saved, lengths: Lengths, mask: FlashMask, score: Score
    ) -> Gradients:
        function, gradients = self._function(1, lengths), _gradients(saved)
        given = _saved(dout, saved) | gradients | _mask(mask) | _score(score) | _UNUSED2
        function(**_lengths(lengths), **given, deterministic=False)
        return gradients["dq"], gradients["dk"], gradients["dv"]

    def _function(self, which: int, lengths: Lengths) -> Callable[..., Any]:
        """The forward (0) or backward (1), of a batch or a chain."""
        return getattr(_interface(self.module), (DENSE if lengths[0] is None else PACKED)[which])


_UNUSED2: Arguments = {"dropout_p": 0.0, "alibi_slopes": None}


class Flash3(FlashPackage):
    """`flash_attn_interface`, in both forms that it has had.

    Until the end of 2025 windows were pairs and what is not used had to be given, too; since then they are two numbers,
    all has defaults, and the backward calls `causal` `is_causal`.
    """

    name = "flash3"
    distribution, module, wanted = "flash-attn-3", "flash_attn_interface", "built from flash-attention's hopper folder"

    def refuses_gpu(self, device: torch.device) -> str | None:
        is_hopper = torch.cuda.get_device_capability(device)[0] == 9
        return None if is_hopper else "needs a Hopper GPU"

    def misfit(self, interface: Any) -> str | None:
        for name, of_this in zip(DENSE, ((), OF_BACKWARD), strict=True):
            has = _parameters(getattr(interface, name, None))
            mask = _mask3(has, _mask((False, {})))
            given = ("q", "k", "v", *LENGTHS, *_score(Score(1.0)), *of_this, *mask, *_unused3(has))
            if reason := _misfit(interface, name, given):
                return reason
        return None

    def call_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, mask: FlashMask, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function = getattr(_interface(self.module), DENSE[0])
        has = _parameters(function)
        given = dict.fromkeys(LENGTHS) | _lengths(lengths) | _mask3(has, _mask(mask)) | _score(score) | _unused3(has)
        out, lse, *_ = function(q=q, k=k, v=v, **given)
        return out, lse

    def call_backward(
        self, dout: torch.Tensor, saved: Saved, lengths: Lengths, mask: FlashMask, score: Score
    ) -> Gradients:
        function, gradients = getattr(_interface(self.module), DENSE[1]), _gradients(saved)
        has = _parameters(function)
        given = dict.fromkeys(LENGTHS) | _lengths(lengths) | _mask3(has, _mask(mask)) | _score(score) | _unused3(has)
        function(**_saved(dout, saved), **gradients, **given, deterministic=False)
        return gradients["dq"], gradients["dk"], gradients["dv"]


# Caches of inference, rotary embeddings, 8-bit scales: wanted without a default by the older form.
_UNUSED3 = {"k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "sequed_q", "sequed_k"}
_UNUSED3 |= {"page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"}
_UNUSED3 |= {"q_descale", "k_descale", "v_descale"}


def _unused3(has: dict[str, inspect.Parameter]) -> Arguments:
    is_backward = "dout" in has  # where `out` is what the forward gave
    names = _UNUSED3 - {"out"} if is_backward else _UNUSED3
    return {name: None for name, p in has.items() if name in names and p.default is p.empty}


def _mask3(has: dict[str, inspect.Parameter], mask: Arguments) -> Arguments:
    """Causal flag and window under the names of this form of the interface."""
    window: Arguments = {name: mask[name] for name in ("window_size_left", "window_size_right")}
    if "window_size" in has:
        window = {"window_size": tuple(window.values())}
    return {"is_causal" if "is_causal" in has else "causal": mask["causal"]} | window


def _mask(mask: FlashMask) -> Arguments:
    """Causal flag and window: -1 leaves a side open."""
    return {"causal": mask[0], "window_size_left": -1, "window_size_right": -1} | mask[1]


def _lengths(lengths: Lengths) -> Arguments:
    """By name; none for a batch."""
    return {} if lengths[0] is None else dict(zip(LENGTHS, lengths, strict=True))


def _score(score: Score) -> Arguments:
    return {"softmax_scale": score.scale, "softcap": score.softcap or 0.0}


def _gradients(saved: Saved) -> dict[str, torch.Tensor]:
    """Memory for dq, dk and dv, which the libraries write into."""
    values = (saved.q_BSHD, saved.k_BSKD, saved.v_BSKD)
    made = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in values)
    return dict(zip(("dq", "dk", "dv"), made, strict=True))


def _saved(dout: torch.Tensor, saved: Saved) -> Arguments:
    q, k, v, out, lse = saved
    return {"dout": dout.contiguous(), "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse.contiguous()}


@cache
def _interface(module: str) -> Any:
    return importlib.import_module(module)


@cache
def _unusable(kernel: FlashPackage) -> str | None:
    """Why a package cannot be called here: not installed, does not import, another interface."""
    version = _installed(kernel.distribution)
    # A module alone is no package: benchmarks put a stand-in where flash-attn 2 would be.
    if version is None:
        return f"is not installed: it is the package {kernel.distribution} ({kernel.wanted})"
    try:
        interface = _interface(kernel.module)
    except Exception as error:  # an extension built for another torch may raise anything
        return f"does not import: {kernel.distribution} {version} gives {type(error).__name__} ({error})"
    if reason := kernel.misfit(interface):
        return f"has another interface in {kernel.distribution} {version} ({reason}): it should be {kernel.wanted}"
    return None


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrong(kernel: FlashPackage, work: Workload) -> str | None:
    kind = {"windowed": work.windowed, "softcapped": work.softcapped, "packed": work.packed}
    return _wrong_results(kernel, work.device, work.dtype, work.head_dim, **kind)


@cache
def _wrong_results(
    kernel: FlashPackage, device: torch.device, dtype: torch.dtype, head_dim: int, **kind: bool
) -> str | None:
    """How a package's results differ from float64's on small problems of a kind; None if by rounding alone."""
    try:
        error = disagreement(kernel, device, dtype, head_dim, **kind)
    except Exception as problem:  # kernels that its build left out, for one
        return f"fails on a small problem: {type(problem).__name__} ({problem})"
    if error <= TOLERANCE:
        return None
    version = _installed(kernel.distribution)
    return f"({kernel.distribution} {version}) is wrong: off float64 by {error:.2g} of a small problem's values"


@cache
def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Of a function, also behind `torch.library.custom_op`."""
    inner = getattr(function, "_init_fn", function)
    return dict(inspect.signature(inner).parameters) if callable(inner) else {}


def _misfit(interface: Any, name: str, given: Iterable[str]) -> str | None:
    """What keeps a function from being called with these arguments by name."""
    has, given = _parameters(getattr(interface, name, None)), set(given)
    if not has:
        return f"no {name}"
    if unknown := sorted(given - set(has)):
        return f"{name} takes no {', '.join(unknown)}"
    needed = [n for n, p in has.items() if p.default is p.empty and n not in given]
    return f"{name} wants {', '.join(needed)}" if needed else None
