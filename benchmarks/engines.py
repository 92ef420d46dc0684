"""The same few training steps under every engine and mode: loss and gradient norm must agree, cost is shown beside.

    python benchmarks/engines.py --num-processes 4 [--sp-degrees 4 2] [--packed] [--preset tiny|300m|1b]
        [--seq-length 32768] [--engines ddp fsdp2] [--modes zigzag_ring_attn usp_attn] [--output FOLDER]

Starts one `accelerate launch -m easyctx.train` after the other on a random model and random tokens; the first row is
plain data parallelism under DDP, on as many sequences a step. Speed and memory
are those of a short run that includes warm-up; `benchmarks/train_step.py` is the benchmark of speed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from shared_parts.results_file import print_table, write_results
from tqdm import tqdm

from easyctx.modes import MODES

ROOT = Path(__file__).parent.parent
PRESETS = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, heads=(4, 2), vocab_size=512),
    "300m": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, heads=(16, 8), vocab_size=32000),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, heads=(16, 8), vocab_size=32000),
}
ENGINES = {
    "ddp": "ddp.yaml",
    "fsdp2": "fsdp2.yaml",
    "fsdp2_offload": "fsdp2_offload.yaml",
    "hsdp": "hsdp_2nodes.yaml",  # in two copies on this one machine
    "zero3": "zero3.yaml",
    "zero3_offload": "zero3_offload.yaml",
}
SHARDED_MODES = [name for name, mode in MODES.items() if mode.is_sequence_parallel]
ROWS = 8  # of the dataset


def make_model_and_data(folder: Path, preset: str, seq_length: int, packed: bool) -> None:
    """A random Llama and rows of random tokens, cut into documents of random lengths where asked for."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(PRESETS[preset])
    heads, kv_heads = settings.pop("heads")
    config = LlamaConfig(
        **settings, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=seq_length
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    columns = {"input_ids": torch.randint(0, config.vocab_size, (ROWS, seq_length)).tolist()}
    if packed:
        borders = torch.rand(ROWS, seq_length) < 12 / seq_length
        columns["document_ids"] = borders.cumsum(1).tolist()
    Dataset.from_dict(columns).save_to_disk(folder / "data")


def run(args: argparse.Namespace, folder: Path, engine: str, mode: str, sp_degree: int) -> dict:
    """One launch; a row with its last step, or with what it said when it failed."""
    row = {
        "method": f"{engine} {mode}",
        "model": args.preset,
        "gpus": args.num_processes,
        "sp_degree": sp_degree,
        "packed": args.packed,
        "seq_length": args.seq_length,
    }
    sequences = args.num_processes  # a step, however they are spread
    data_parallel = args.num_processes // sp_degree
    output = folder / f"{engine}_{mode}_{sp_degree}"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / ENGINES[engine]),
    ]
    command += ["--num_processes", str(args.num_processes), "--main_process_port", "0"]
    if engine == "hsdp":
        command += ["--num_machines", "1", "--parallelism_config_dp_replicate_size", "2"]
        command += ["--parallelism_config_dp_shard_size", str(args.num_processes // 2)]
    if not torch.cuda.is_available():
        command += ["--mixed_precision", "no"]
    command += ["-m", "easyctx.train", "--model", str(folder / "model"), "--dataset", str(folder / "data")]
    command += ["--output-dir", str(output), "--seq-length", str(args.seq_length), "--parallel_mode", mode]
    command += ["--max-train-steps", str(args.steps), "--tracker", "none"]
    command += ["--gradient-accumulate-every", str(sequences // data_parallel)]
    command += ["--learning-rate", "1e-3", "--warmup-steps", "1"]
    if mode == "data_parallel":
        command += ["--memory", "off"]  # the stock model, which the others are held against
    else:
        command += ["--sp-degree", str(sp_degree)]
    if mode == "usp_attn":
        command += ["--ring_degree", str(max(sp_degree // 2, 1))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired as expired:
        print(str(expired.stderr)[-3000:], file=sys.stderr)
        return row | {"error_message": f"not done after {args.timeout} s"}
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        print(done.stderr[-3000:], file=sys.stderr)
        return row | {"error_message": lines[0] if lines else f"exit status {done.returncode}"}
    card = json.loads((output / "easyctx_run.json").read_text())
    first, last = card["first_step"], card["last_step"]
    # Before the first update engines differ by rounding only; afterwards Adam makes much of tiny gradients.
    row |= {"loss": first["loss"], "grad_norm": first["grad_norm"], "last_loss": last["loss"]}
    if args.at_once > 1:  # launches that share the machine say nothing of speed
        return row
    memory = last["peak_gib"] if torch.cuda.is_available() else None
    return row | {"tokens_per_s": last["tokens_per_second"], "peak_gpu_gib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-processes", type=int, default=max(torch.cuda.device_count(), 2))
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sp-degrees", type=int, nargs="+", help="of the sharded modes (default: all processes)")
    parser.add_argument("--at-once", type=int, default=1, help="launches side by side; their speed is not reported")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a launch may take")
    parser.add_argument("--packed", action="store_true", help="rows of several documents")
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=list(ENGINES))
    parser.add_argument("--modes", nargs="+", choices=SHARDED_MODES, default=SHARDED_MODES)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model_and_data(Path(folder), args.preset, args.seq_length, args.packed)
        degrees = args.sp_degrees or [args.num_processes]
        runs = [("ddp", "data_parallel", 1), *itertools.product(args.engines, args.modes, degrees)]
        with ThreadPoolExecutor(args.at_once) as pool:
            rows = list(tqdm(pool.map(lambda each: run(args, Path(folder), *each), runs), total=len(runs)))
    path = write_results("engines", rows, args.output)
    print_table(rows)
    print(path)


if __name__ == "__main__":
    main()
