"""What easyctx/cost predicts: modes over GPUs and lengths, steps beside those that others ran, charts of both.

    python benchmarks/cost_model.py [--gpu h200] [--outside] [--output FOLDER]
    python benchmarks/cost_model.py --measured benchmarks/results/attention_*.json [--calibrate] [--outside]

The first writes predictions and draws which mode to take when. In its files all figures are predicted, but for
`tokens_per_s` and `peak_gpu_gib` of the steps, which others measured or published (cost_parts/reference_steps.json says
who). The second prints predicted beside measured attention; cost_parts/reference_attention.json holds what an early
trial measured. Eight GPUs make a node; there is NVLink inside it and one network adapter a GPU between nodes.
`--outside`: as if merges and gradient sums were made outside of the kernels also where they are not.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cost_parts.charts import draw_choice, draw_shares
from cost_parts.compare import compare_attention, compare_steps
from shared_parts.results_file import RESULTS, print_table, write_results

from easyctx.cost.choose import best, candidates
from easyctx.cost.hardware import Cluster, Device, find_device
from easyctx.cost.kernels import kernel_rates
from easyctx.cost.stages import OUTSIDE, Passes, Shape

Row = dict[str, Any]
GPUS_PER_NODE = 8
HEADS = ((32, 8), (32, 32))
WINDOW = 4096


def predictions(device: Device, gpus: list[int], lengths: list[int], passes: Passes | None) -> list[Row]:
    """One row for each mode that can run; `chosen` marks what `--parallel_mode auto` takes."""
    cases = [(heads, None) for heads in HEADS] + [(HEADS[0], WINDOW)]
    rows = []
    for (q_heads, kv_heads), window in cases:
        for size in gpus:
            cluster = Cluster(device, size, max(size // GPUS_PER_NODE, 1))
            for tokens in lengths:
                found = candidates(Shape(tokens, q_heads, kv_heads, 128), cluster, {window: 1}, passes=passes)
                for candidate in found:
                    row = {"method": candidate.mode, "ring_degree": candidate.ring_degree, "gpu": device.name}
                    row |= {"gpus": size, "nodes": cluster.nodes, "tokens_per_gpu": tokens, "q_heads": q_heads}
                    row |= {"kv_heads": kv_heads, "window": window, "kernel": kernel_rates(device).name}
                    cost = candidate.cost
                    row |= {"predicted_ms": cost.seconds * 1e3, "predicted_exposed_ms": cost.exposed_seconds * 1e3}
                    row |= {"predicted_tflops_per_gpu": cost.tflops_per_gpu, "predicted_share": cost.share}
                    rows.append(row | {"chosen": candidate == best(found)})
    return rows


def predict(args: argparse.Namespace, passes: Passes | None) -> None:
    device, folder = find_device(args.gpu), args.output or RESULTS
    rows, steps = predictions(device, args.gpus, args.tokens_per_gpu, passes), compare_steps()
    print_table([{"number": name, "source": device.sources[name]} for name in sorted(device.sources)])
    print(f"kernel rates of {kernel_rates(device).name}: {kernel_rates(device).source}\n")
    print_table([row for row in rows if row["chosen"]])
    print()
    print_table(steps)
    print(write_results(f"cost_model_modes_predicted_{device.name}", rows, folder))
    print(write_results("cost_model_steps_predicted", steps, folder))

    kernel = kernel_rates(device).name
    what = f"{device.name.upper()}, {GPUS_PER_NODE} to a node, forward + backward, {kernel} (predicted)"
    choice, shares = (folder / f"cost_model_{name}_{device.name}.png" for name in ("choice", "shares"))
    draw_choice(rows, choice, f"The mode to take, and the share of the local kernel's rate that it keeps: {what}")
    causal = [row for row in rows if row["window"] is None and (row["q_heads"], row["kv_heads"]) == HEADS[0]]
    draw_shares(causal, shares, f"Causal attention, 32 query and 8 key/value heads: {what}")
    print(choice, shares, sep="\n")


def compare(paths: list[Path], passes: Passes | None, calibrate: bool) -> None:
    rows = [row for path in paths for row in compare_attention(path, passes, calibrate)]
    for row in rows:
        if "not_predicted" in row:
            print(f"{row['method']}, {row['mask']}, {row['kernel']}: {row['not_predicted']}")
    predicted = [row for row in rows if "error" in row]
    if not predicted:
        raise ValueError("no row of a mode with figures in these files")
    print_table(predicted)
    errors = sorted(abs(row["error"]) for row in predicted)
    print(f"{len(errors)} rows, error at most {errors[-1]:.1%}, median {errors[len(errors) // 2]:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", help="result files of benchmarks/attention.py")
    parser.add_argument("--calibrate", action="store_true", help="kernel rates from the local rows of the same file")
    parser.add_argument("--outside", action="store_true", help="merges and gradient sums outside of the kernels")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 4, 8, 16, 64, 1024])
    parser.add_argument("--tokens-per-gpu", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file and the charts")
    args = parser.parse_args()
    passes = OUTSIDE if args.outside else None
    try:
        if args.measured:
            compare(args.measured, passes, args.calibrate)
        else:
            predict(args, passes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
