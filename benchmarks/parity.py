"""Error of every sequence-parallel mode against float64, beside that of one device's kernel on the whole sequence.

    torchrun --nproc-per-node 2 benchmarks/parity.py [--tokens-per-gpu 2048] [--output FOLDER]

Relative errors (Frobenius norm) of out, dq, dk and dv in the given dtype. On GPUs every kernel that runs there is
measured, on a CPU torch's (in the dtype asked for).
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from results_file import print_table, write_results

from easyctx import gather_sequence, make_mesh
from easyctx.attention import Context, register_context, seq_parallel_attention
from easyctx.band import CAUSAL, Band
from easyctx.engine import make_accelerator
from easyctx.kernel import KERNELS, Kernel, Saved, Workload
from easyctx.mesh import leave_processes
from easyctx.modes import MODES

Gradients = tuple[torch.Tensor, ...]
NAMES = ("out", "dq", "dk", "dv")


def inputs(length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> Gradients:
    """q, k, v and dout of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return tuple(
        torch.randn(1, length, count, head_dim, generator=generator).to(device=device, dtype=dtype) for count in counts
    )


def on_one_device(kernel: Kernel, tensors: Gradients, band: Band, dtype: torch.dtype) -> Gradients:
    """out, dq, dk, dv of one kernel call over the whole sequence."""
    q, k, v, dout = (t.to(dtype) for t in tensors)
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.forward(q, k, v, band, scale)
    gradients = kernel.backward(dout, Saved(q, k, v, out, lse), band, scale)
    return out, *(gradient.to(dtype) for gradient in gradients)  # as a user gets them


def sharded(mode: str, kernel: str, tensors: Gradients, window: int) -> Gradients:
    """The same through `mode` over all ranks, gathered."""
    mesh, layout = make_mesh(), MODES[mode].layout
    length = tensors[0].shape[1]
    local = [layout.shard(t, mesh.sp_size, mesh.sp_rank) for t in tensors]
    q, k, v = (t.requires_grad_() for t in local[:3])
    number = register_context(Context(MODES[mode], mesh, kernel))
    out, _ = seq_parallel_attention(q, k, v, q.shape[-1] ** -0.5, window, number)
    out.backward(local[3])
    results = [t for t in (out, q.grad, k.grad, v.grad) if t is not None]
    return tuple(gather_sequence(mode, t, mesh, length) for t in results)


def errors(got: Gradients, want: Gradients) -> dict[str, float]:
    pairs = zip(NAMES, got, want, strict=True)
    return {name: float((g.double() - w).norm() / w.norm()) for name, g, w in pairs}


def compare(args: argparse.Namespace, device: torch.device, kernel: Kernel, window: int) -> list[dict]:
    """A row for one device, and one for each mode, under one kernel and mask."""
    dtype = getattr(torch, args.dtype)
    length = args.tokens_per_gpu * dist.get_world_size()
    band = Band(low=-(window - 1), high=0) if window else CAUSAL
    tensors = inputs(length, (args.q_heads, args.kv_heads), args.head_dim, dtype, device)
    want = on_one_device(KERNELS["reference"], tensors, band, torch.float64)
    local = errors(on_one_device(kernel, tensors, band, dtype), want)
    rows = []
    modes = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
    for mode in ["one device", *modes]:
        found = local if mode == "one device" else errors(sharded(mode, kernel.name, tensors, window), want)
        rows.append(
            {
                "method": mode,
                "kernel": kernel.name,
                "mask": f"window {window}" if window else "causal",
                "dtype": args.dtype,
                "q_heads": args.q_heads,
                "kv_heads": args.kv_heads,
                "gpus": dist.get_world_size(),
                "tokens_per_gpu": args.tokens_per_gpu,
                **{f"{name}_error": found[name] for name in NAMES},
                **{f"{name}_over_local": found[name] / max(local[name], 1e-300) for name in NAMES},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-gpu", type=int, default=2048)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--windows", type=int, nargs="*", default=[0, 1000], help="0 is plain causal")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    accelerator = make_accelerator()
    rows = []
    for window in args.windows:
        work = Workload(accelerator.device, getattr(torch, args.dtype), args.head_dim, windowed=window > 0)
        for kernel in KERNELS.values():
            if kernel.name == "reference":
                continue
            if reason := kernel.refuses(work):
                accelerator.print(f"{kernel.name} {reason}")
                continue
            rows += compare(args, accelerator.device, kernel, window)
    if accelerator.is_main_process:
        print_table(rows)
        print(write_results("parity", rows, args.output))
    leave_processes()


if __name__ == "__main__":
    main()
