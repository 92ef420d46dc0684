"""Third-party attention behind the same modes: the packages that long-context training was built on before.

For comparison with easyctx's own, which is the default and does all that they do. What they lack is refused by name.
Both rest on FlashAttention 2 (the `flash-attn` package, CUDA only), and neither is imported before it is asked for.
"""

import atexit
import importlib
import importlib.metadata
import sys
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from easyctx.capability import window_of
from easyctx.mesh import Mesh
from easyctx.modes import MODES

if TYPE_CHECKING:
    from easyctx.documents import Documents

OWN = "easyctx"
HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256  # of FlashAttention 2


@dataclass(frozen=True)
class Backend:
    """A package, and which of its functions serves each mode.

    lacks: for some modes, what FlashAttention 2 has and the package loses there.
    """

    name: str
    distribution: str
    version: str  # the one whose interface this file was written for
    functions: dict[str, str]
    lacks: dict[str, tuple[str, ...]] = field(default_factory=dict)


BLOCKWISE = ("sliding window", "softcap")  # each block would be masked as if it were the whole
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "ring_flash_attn",
            "ring-flash-attn",
            "0.1.8",
            {
                "ring_attn": "ring_flash_attn.ring_flash_attn:ring_flash_attn_func",
                "zigzag_ring_attn": "ring_flash_attn.zigzag_ring_flash_attn:zigzag_ring_flash_attn_func",
                "striped_attn": "ring_flash_attn.stripe_flash_attn:stripe_flash_attn_func",
            },
            # The plain ring's backward returns dq in bfloat16, whatever it was given.
            {"ring_attn": (*BLOCKWISE, "float16"), "zigzag_ring_attn": BLOCKWISE, "striped_attn": BLOCKWISE},
        ),
        Backend(
            "yunchang",
            "yunchang",
            "0.6.4",
            {"ulysses_attn": "yunchang:UlyssesAttention", "usp_attn": "yunchang:LongContextAttention"},
            {"usp_attn": BLOCKWISE},
        ),
    )
}
BACKENDS = (OWN, *_BACKENDS)


def modes_of(name: str) -> tuple[str, ...]:
    """The modes that a backend serves."""
    return tuple(MODES) if name == OWN else tuple(_BACKENDS[name].functions)


def check_backend(name: str, mode: str, kernel: str = "auto") -> None:
    """Refuse a backend that does not exist, does not serve `mode`, has no such kernel, or cannot be imported here.

    Raises:
        ValueError: with what is missing and how to get it.
    """
    if name == OWN:
        return
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")
    backend = _BACKENDS[name]
    if mode not in backend.functions:
        raise ValueError(
            f"attention backend {name} has no {mode}, only {', '.join(backend.functions)}: choose one of these modes, "
            "or leave the backend out"
        )
    if kernel != "auto":
        raise ValueError(
            f"attention kernel {kernel} is one of easyctx's own, and backend {name} brings its own: leave one of the "
            "two out"
        )
    way_out = f"install what is missing (pip install {backend.distribution}=={backend.version} flash-attn), or leave "
    way_out += f"the backend out: easyctx's own {mode} needs neither"
    found = _installed(backend.distribution)
    if found != backend.version:
        what = "which is not installed" if found is None else f"and {found} is installed"
        raise ValueError(f"attention backend {name} needs {backend.distribution} {backend.version}, {what}: {way_out}")
    for module in ("flash_attn.flash_attn_interface", backend.functions[mode].partition(":")[0]):
        try:
            _import(module)
        except ImportError as error:
            raise ValueError(
                f"attention backend {name} needs {module}, which does not import here ({error}): {way_out}"
            ) from error


def check_backend_config(name: str, mode: str, config: Any, sp_size: int = 1, ring_degree: int | None = None) -> None:
    """Refuse a model whose attention the backend cannot compute.

    Args:
        config: a transformers configuration (its text part is looked at).
        sp_size, ring_degree: ranks that share a sequence, and how many of them form the ring (`usp_attn`).

    Raises:
        ValueError: naming what the backend lacks.
    """
    if name == OWN:
        return
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    wanted = {
        "sliding window": window_of(text) is not None,
        "softcap": bool(getattr(text, "attn_logit_softcapping", None)),
        "sinks": text.model_type == "gpt_oss",
    }
    _refuse(name, mode, [what for what, is_wanted in wanted.items() if is_wanted])
    _check_head_dim(name, head_dim)
    _check_kv_heads(name, mode, kv_heads, sp_size // (ring_degree or 1))


def _check_kv_heads(name: str, mode: str, kv_heads: int, degree: int) -> None:
    if name == "yunchang" and kv_heads % degree:
        raise ValueError(
            f"attention backend yunchang deals whole key/value heads out to ranks, and {kv_heads} of them do not go "
            f"round {degree}: use a Ulysses degree that divides {kv_heads}, or easyctx's own {mode}, which copies them"
        )


def _check_head_dim(name: str, head_dim: int) -> None:
    if head_dim > LARGEST_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"attention backend {name} takes head dims that are multiples of 8 up to {LARGEST_HEAD_DIM}, "
            f"not {head_dim}: leave it out"
        )


def _refuse(name: str, mode: str, wanted: list[str]) -> None:
    never = ("sinks", "document borders")
    lacking = [what for what in wanted if what in never or what in _BACKENDS[name].lacks.get(mode, ())]
    if lacking:
        raise ValueError(
            f"attention backend {name} has no {' and no '.join(lacking)} in {mode}: leave it out, easyctx's own has"
        )


def third_party_attention(
    name: str,
    mode: str,
    mesh: Mesh,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
    documents: "Documents | None" = None,
) -> torch.Tensor:
    """Causal attention through the package, `[B, S/P, H, D]`; arguments as of `easyctx.attention`.

    Raises ValueError, before anything is computed, for what it lacks.
    """
    wanted = {
        "sliding window": window > 0,
        "softcap": softcap > 0,
        "sinks": sinks_H is not None,
        "document borders": documents is not None,
        "float16": q_BSHD.dtype == torch.float16,
    }
    _refuse(name, mode, [what for what, is_wanted in wanted.items() if is_wanted])
    if q_BSHD.dtype not in HALF:
        raise ValueError(
            f"attention backend {name} takes bfloat16 or float16, not {q_BSHD.dtype}: train in mixed precision "
            "(mixed_precision: bf16 in the accelerate configuration), or leave the backend out"
        )
    _check_head_dim(name, q_BSHD.shape[-1])
    if name == "yunchang":
        attention = _yunchang(mode, mesh)
        _check_kv_heads(name, mode, k_BSKD.shape[2], (mesh.sp if mode == "ulysses_attn" else mesh.ulysses).size)
        more = {"window_size": (window - 1, 0) if window else (-1, -1), "softcap": softcap}
    else:
        attention, more = _function(name, mode), {"group": mesh.sp_group}
    tensors = (t.contiguous() for t in (q_BSHD, k_BSKD, v_BSKD))
    return attention(*tensors, softmax_scale=scale, causal=True, **more)


@cache
def _yunchang(mode: str, mesh: Mesh) -> Any:
    """Its module for this mesh. It takes its groups of USP from a global, once, when it is made."""
    if mode == "ulysses_attn":
        return _function("yunchang", mode)(mesh.sp_group)
    groups = _import("yunchang.globals").PROCESS_GROUP
    groups.ULYSSES_PG, groups.RING_PG = mesh.ulysses.group, mesh.ring.group
    return _function("yunchang", mode)(ring_impl_type="zigzag")


# The modules hold process groups, which must be gone before the interpreter is (see `easyctx.mesh`).
atexit.register(_yunchang.cache_clear)


def _function(name: str, mode: str) -> Any:
    module, _, function = _BACKENDS[name].functions[mode].partition(":")
    return getattr(_import(module), function)


def _import(module: str) -> ModuleType:
    if module.startswith("ring_flash_attn"):
        _leave_out_adapter()
    return importlib.import_module(module)


def _leave_out_adapter() -> None:
    """Let ring-flash-attn import without its patch of transformers, which wants names that transformers 5 dropped."""
    name = "ring_flash_attn.adapters"
    if name not in sys.modules:
        adapters: Any = ModuleType(name)
        adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
        sys.modules[name] = adapters


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
