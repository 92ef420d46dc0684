"""What each mode sends in one layer: KiB for each token that a rank holds, forward and backward.

    python benchmarks/traffic.py [--ranks 2 8 16] [--q-heads 32] [--kv-heads 8] [--head-dim 128] [--output FOLDER]

The schedules run on virtual ranks (`easyctx.virtual`), in bfloat16, and every byte that leaves a rank for another one
is counted; the mean over ranks, and over the tokens of a rank, is shown. Sums of gradients travel in float32. In the
rows with a window a query sees an eighth of the tokens that a rank holds; in the packed rows each document has as
many tokens as a rank holds, beginning in the middle of one rank's and ending in that of the next.
"""

import argparse
from pathlib import Path

import torch
from shared_parts.results_file import print_table, write_results

from easyctx.documents import Documents
from easyctx.kernel import KERNELS, Saved, Score
from easyctx.mask import CAUSAL_MASK, Mask
from easyctx.mesh import Mesh
from easyctx.modes import MODES, Mode
from easyctx.schedule import Attention
from easyctx.virtual import VirtualRanks


def masks(local: int, ranks: int) -> dict[str, Mask]:
    """By name, for `local` tokens a rank."""
    starts = (0, *range(local // 2, local * ranks, local))
    return {
        "causal": CAUSAL_MASK,
        "window": Mask(local // 8),
        "packed": Mask(documents=Documents(local * ranks, (starts,))),
    }


def bytes_of(mode: Mode, size: int, args: argparse.Namespace, mask: Mask) -> tuple[int, int]:
    """Bytes that leave all ranks in a layer's forward and in its backward."""
    ranks = VirtualRanks(size, size // 2 if mode.over == "both" else None)
    q, k = (torch.zeros(1, args.tokens, heads, args.head_dim, dtype=torch.bfloat16) for heads in args.heads)

    def forward(mesh: Mesh) -> tuple[Attention, torch.Tensor, torch.Tensor]:
        assert mode.schedule is not None
        ring, ulysses = mode.axes(mesh)
        call = Attention(mode.layout, KERNELS["tiled"], Score(1.0), mask, ring, ulysses)
        return call, *mode.schedule.forward(q, k, k, call)

    passed = dict(zip(ranks.meshes, ranks.run(forward), strict=True))
    sent = ranks.bytes_sent()

    def backward(mesh: Mesh) -> None:
        assert mode.schedule is not None
        call, out, lse = passed[mesh]
        mode.schedule.backward(q, Saved(q, k, k, out.to(q.dtype), lse), call)

    ranks.run(backward)
    ranks.close()
    return sent, ranks.bytes_sent() - sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of a rank; what is shown hardly depends on it")
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    args.heads = (args.q_heads, args.kv_heads)
    rows = []
    for size in args.ranks:
        for mask_name, mask in masks(args.tokens, size).items():
            for mode in (mode for mode in MODES.values() if mode.is_sequence_parallel):
                sent = [count / size / args.tokens / 1024 for count in bytes_of(mode, size, args, mask)]
                row = {"method": mode.name, "ranks": size, "mask": mask_name, "q_heads": args.q_heads}
                row |= {"kv_heads": args.kv_heads, "head_dim": args.head_dim, "tokens_per_rank": args.tokens}
                rows.append(row | {"forward_kib_per_token": sent[0], "backward_kib_per_token": sent[1]})
    print_table(rows)
    print(write_results("traffic", rows, args.output))


if __name__ == "__main__":
    main()
