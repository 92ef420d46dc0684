"""How the error of half-precision attention against float64 grows with the number of ranks: 2 to 16, on one device.

    python benchmarks/ring_error.py [--tokens 4096] [--kernels flash4 cudnn] [--output FOLDER]

The ranks are virtual (`easyctx.virtual`): threads that compute and send what real ranks would. Errors are relative
(Frobenius norm), of out, dq, dk and dv, and as multiples of those of the same kernel on the whole sequence.
"""

import argparse

import torch
from attention_parts.errors import (
    HALF_AND_SINGLE,
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

from easyctx.kernel import KERNEL_CHOICES, KERNELS, Score
from easyctx.modes import MODES
from easyctx.virtual import VirtualRanks, virtual_attention


def rows_of(args: argparse.Namespace, kernel_name: str, mask_name: str, device: torch.device) -> list[dict]:
    """A row for one device and one for every mode and number of ranks."""
    dtype, kernel = getattr(torch, args.dtype), KERNELS[kernel_name]
    mask = make_mask(mask_name, args.tokens)
    if reason := kernel.refuses(work_of(mask, dtype, args.head_dim, device)):
        print(f"{mask_name}: {kernel_name} {reason}")
        return []
    tensors = random_tensors(args.tokens, (args.q_heads, args.kv_heads), args.head_dim, dtype, device)
    want = truth(tensors, mask)
    local = errors(on_one_device(kernel, tensors, mask, dtype), want)
    described = {"kernel": kernel_name, "mask": mask_name, "dtype": args.dtype, "tokens": args.tokens}
    described |= {"q_heads": args.q_heads, "kv_heads": args.kv_heads}
    rows = [{"method": "one device", "ranks": 1, **described, **error_columns(local, local)}]
    for mode in (mode for mode in MODES.values() if mode.is_sequence_parallel):
        for size in args.ranks:
            ranks = VirtualRanks(size, 2 if mode.over == "both" else None)
            score = Score(args.head_dim**-0.5)
            out, _, *gradients = virtual_attention(mode, ranks, tensors, mask, score, kernel)
            ranks.close()
            found = errors(tuple(t.to(dtype) for t in (out, *gradients)), want)
            rows.append({"method": mode.name, "ranks": size, **described, **error_columns(found, local)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=KERNEL_CHOICES)
    add_arguments(parser, ["causal"], HALF_AND_SINGLE)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for mask_name in args.masks:
        for name in args.kernels:
            work = work_of(make_mask(mask_name, args.tokens), getattr(torch, args.dtype), args.head_dim, device)
            chosen = next(k.name for k in KERNELS.values() if k.refuses(work) is None) if name == "auto" else name
            rows += rows_of(args, chosen, mask_name, device)
    print_table(rows)
    print(write_results("ring_error", rows, args.output))


if __name__ == "__main__":
    main()
