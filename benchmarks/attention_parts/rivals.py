"""Other packages' attention over the same tokens, for benchmarks/attention.py (and train_step.py).

Each builder raises ValueError, with the reason, where its package does not import or cannot compute the case.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_parts import flash_attn_stand_in
from attention_parts.cases import Case
from attention_parts.methods import Method, differentiable
from easyctx.backend import check_backend, third_party_attention
from easyctx.layout import CONTIGUOUS, ZIGZAG
from easyctx.mesh import num_processes
from easyctx.modes import MODES, make_mode_mesh

FA2 = "torch_flash"  # the local kernel that FlashAttention 2 is compared with, PyTorch's copy of it


def _packaged(backend: str, mode: str) -> Callable[[str, Case, int], Method]:
    """A package as `--attn-backend` runs it, over the stand-in where flash-attn 2 is not installed."""

    def build(name: str, case: Case, ring_degree: int) -> Method:
        flash_attn_stand_in.install()
        check_backend(backend, mode)
        degree = ring_degree if MODES[mode].over == "both" else None
        mesh = make_mode_mesh(mode, ring_degree=degree)
        settings = dict(window=case.mask.window or 0, documents=case.mask.documents, scale=case.head_dim**-0.5)

        def attention(*qkv: torch.Tensor) -> torch.Tensor:
            return third_party_attention(backend, mode, mesh, *qkv, **settings)

        return differentiable(name, FA2, MODES[mode].shard_layout(case.ranks, degree), attention)

    return build


def _llama3(name: str, case: Case, ring_degree: int) -> Method:
    """ring-flash-attn's way for packed rows: keys are gathered, each rank has the queries of one stretch."""
    flash_attn_stand_in.install()
    check_backend("ring_flash_attn", "ring_attn")
    import ring_flash_attn

    starts = (0,) if case.mask.documents is None else case.mask.documents.starts[0]
    cu_seqlens = torch.tensor([*starts, case.length], dtype=torch.int32, device=case.device)
    cu_q, cu_k, longest_q, longest_k, keys = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(
        cu_seqlens, True, dist.get_rank(), case.ranks
    )
    window = (-1, -1) if case.mask.window is None else (case.mask.window - 1, 0)
    # A quarter of the heads is gathered while another is computed.
    stride = max(case.heads[1] // 4, 1)

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        tokens = (t.squeeze(0) for t in qkv)
        out = ring_flash_attn.llama3_flash_attn_varlen_func(
            *tokens, cu_q, cu_k, longest_q, longest_k, stride, keys, causal=True, window_size=window, group=_world()
        )
        return out.unsqueeze(0)

    return differentiable(name, FA2, CONTIGUOUS, attention)


def _context_parallel(kernel: str, backend: SDPBackend) -> Callable[[str, Case, int], Method]:
    """PyTorch's context_parallel around scaled_dot_product_attention, its keys gathered, as accelerate uses it."""

    def build(name: str, case: Case, ring_degree: int) -> Method:
        if case.mask_name != "causal":
            raise ValueError(f"context_parallel of scaled_dot_product_attention is causal only, not {case.mask_name}")
        if case.device.type != "cuda":
            raise ValueError(f"context_parallel has attention for CUDA only, not {case.device.type}")

        def attention(*qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in qkv)
            return causal_attention(q, k, v, backend).transpose(1, 2)

        def context() -> AbstractContextManager[None]:
            return context_parallel_region(case.length, case.device, backend)

        return differentiable(name, kernel, ZIGZAG, attention, context)

    return build


def causal_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    backend: SDPBackend,
    scale: float | None = None,
) -> torch.Tensor:
    """PyTorch's attention as `context_parallel_region` has it, `[B, H, S, D]`."""
    grouped = q_BHSD.shape[1] != k_BKSD.shape[1]
    if grouped and backend == SDPBackend.FLASH_ATTENTION:  # which has no GQA there
        copies = q_BHSD.shape[1] // k_BKSD.shape[1]
        k_BKSD, v_BKSD = (t.repeat_interleave(copies, dim=1) for t in (k_BKSD, v_BKSD))
        grouped = False
    # Looked up at each call: within the context it is another function.
    return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)


@contextmanager
def context_parallel_region(length: int, device: torch.device, backend: SDPBackend) -> Iterator[None]:
    """Within it PyTorch's attention is over all ranks' shards of `length` tokens; on one process just its own."""
    with sdpa_kernel(backend) if device.type == "cuda" else nullcontext():
        if num_processes() == 1:
            yield
            return
        from torch.distributed.tensor.experimental import context_parallel

        # It wants something to shard, to know the length by; q, k and v come sharded as it shards.
        buffer, mesh = torch.zeros(length, device=device), _device_mesh(device.type)
        with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]):
            yield


@cache
def _device_mesh(device_type: str) -> object:
    return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("cp",))


def _world() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()


RIVALS: dict[str, Callable[[str, Case, int], Method]] = {
    "ring_flash_attn_zigzag": _packaged("ring_flash_attn", "zigzag_ring_attn"),
    "ring_flash_attn_ring": _packaged("ring_flash_attn", "ring_attn"),
    "ring_flash_attn_llama3": _llama3,
    "yunchang_ulysses": _packaged("yunchang", "ulysses_attn"),
    "yunchang_usp": _packaged("yunchang", "usp_attn"),
    "context_parallel_cudnn": _context_parallel("cudnn", SDPBackend.CUDNN_ATTENTION),
    "context_parallel_flash": _context_parallel(FA2, SDPBackend.FLASH_ATTENTION),
}
RIVAL_KERNELS = {"context_parallel_cudnn": "cudnn"}  # the others': FA2
