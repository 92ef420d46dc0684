"""Error of every sequence-parallel mode on real ranks against float64, beside that of one device's kernel.

    torchrun --nproc-per-node 2 benchmarks/parity.py [--tokens-per-gpu 2048] [--output FOLDER]

Relative errors (Frobenius norm) of out, dq, dk and dv in the given dtype. On GPUs every kernel that runs there is
measured, on a CPU torch's (in the dtype asked for). For more ranks than there are GPUs see ring_error.py.
"""

import argparse

import torch
import torch.distributed as dist
from attention_parts.errors import (
    HALF_AND_SINGLE,
    MASKS,
    add_arguments,
    error_columns,
    errors,
    make_mask,
    on_one_device,
    random_tensors,
    truth,
    work_of,
)
from shared_parts.results_file import print_table, write_results

from easyctx import gather_sequence
from easyctx.engine import make_accelerator
from easyctx.functional import seq_parallel_attn_func
from easyctx.kernel import KERNELS, Kernel
from easyctx.mask import Mask
from easyctx.mesh import leave_processes
from easyctx.modes import MODES, make_mode_mesh

Tensors = tuple[torch.Tensor, ...]


def sharded(mode: str, kernel: str, tensors: Tensors, mask: Mask) -> Tensors:
    """out, dq, dk, dv through `mode` over all ranks, gathered."""
    ring_degree = 2 if mode == "usp_attn" else None
    mesh = make_mode_mesh(mode, ring_degree=ring_degree)
    layout = MODES[mode].shard_layout(mesh.sp_size, ring_degree)
    local = [layout.shard(t, mesh.sp_size, mesh.sp_rank) for t in tensors]
    q, k, v = (t.requires_grad_() for t in local[:3])
    window = (-1, -1) if mask.window is None else (mask.window - 1, 0)
    out = seq_parallel_attn_func(
        mode, q, k, v, window_size=window, documents=mask.documents, ring_degree=ring_degree, kernel=kernel
    )
    out.backward(local[3])
    results = [t for t in (out, q.grad, k.grad, v.grad) if t is not None]
    return tuple(gather_sequence(mode, t, mesh, tensors[0].shape[1]) for t in results)


def compare(args: argparse.Namespace, device: torch.device, kernel: Kernel, mask_name: str) -> list[dict]:
    """A row for one device, and one for each mode, under one kernel and mask."""
    dtype = getattr(torch, args.dtype)
    length = args.tokens_per_gpu * dist.get_world_size()
    mask = make_mask(mask_name, length)
    tensors = random_tensors(length, (args.q_heads, args.kv_heads), args.head_dim, dtype, device)
    want = truth(tensors, mask)
    local = errors(on_one_device(kernel, tensors, mask, dtype), want)
    rows = []
    modes = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
    for mode in ["one device", *modes]:
        found = local if mode == "one device" else errors(sharded(mode, kernel.name, tensors, mask), want)
        rows.append(
            {
                "method": mode,
                "kernel": kernel.name,
                "mask": mask_name,
                "dtype": args.dtype,
                "q_heads": args.q_heads,
                "kv_heads": args.kv_heads,
                "gpus": dist.get_world_size(),
                "tokens_per_gpu": args.tokens_per_gpu,
                **error_columns(found, local),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-gpu", type=int, default=2048)
    add_arguments(parser, MASKS, (*HALF_AND_SINGLE, "float64"))
    args = parser.parse_args()
    accelerator = make_accelerator()
    rows = []
    for mask_name in args.masks:
        length = args.tokens_per_gpu * dist.get_world_size()
        work = work_of(make_mask(mask_name, length), getattr(torch, args.dtype), args.head_dim, accelerator.device)
        for kernel in KERNELS.values():
            if kernel.name == "reference":
                continue
            if reason := kernel.refuses(work):
                accelerator.print(f"{mask_name}: {kernel.name} {reason}")
                continue
            rows += compare(args, accelerator.device, kernel, mask_name)
    if accelerator.is_main_process:
        print_table(rows)
        print(write_results("parity", rows, args.output))
    leave_processes()


if __name__ == "__main__":
    main()
