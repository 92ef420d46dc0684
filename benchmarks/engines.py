"""The same few training steps under every engine and mode: loss and gradient norm must agree, cost is shown beside.

    python benchmarks/engines.py --num-processes 2 [--preset tiny|300m|1b] [--seq-length 32768] [--output FOLDER]

Starts one `accelerate launch -m easyctx.train` after the other on a random model and random tokens. Speed and memory
are those of a short run that includes warm-up; `benchmarks/train_step.py` is the benchmark of speed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from results_file import print_table, write_results

ROOT = Path(__file__).parent.parent
PRESETS = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, heads=(4, 2), vocab_size=512),
    "300m": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, heads=(16, 8), vocab_size=32000),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, heads=(16, 8), vocab_size=32000),
}
RUNS = {  # engine -> (configuration, modes)
    "ddp": ("ddp.yaml", ("zigzag_ring_attn", "ring_attn")),
    "fsdp2": ("fsdp2.yaml", ("zigzag_ring_attn",)),
    "zero3_offload": ("zero3_offload.yaml", ("zigzag_ring_attn",)),
}


def make_model_and_data(folder: Path, preset: str, seq_length: int) -> None:
    """A random Llama and rows of random tokens."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(PRESETS[preset])
    heads, kv_heads = settings.pop("heads")
    config = LlamaConfig(
        **settings, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=seq_length
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokens = torch.randint(0, config.vocab_size, (8, seq_length)).tolist()
    Dataset.from_dict({"input_ids": tokens}).save_to_disk(folder / "data")


def run(args: argparse.Namespace, folder: Path, engine: str, mode: str) -> dict:
    """One launch; a row with its last step, or with what it said when it failed."""
    row = {
        "method": f"{engine} {mode}",
        "model": args.preset,
        "gpus": args.num_processes,
        "seq_length": args.seq_length,
    }
    output = folder / f"{engine}_{mode}"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / RUNS[engine][0]),
    ]
    command += ["--num_processes", str(args.num_processes)]
    if not torch.cuda.is_available():
        command += ["--mixed_precision", "no"]
    command += ["-m", "easyctx.train", "--model", str(folder / "model"), "--dataset", str(folder / "data")]
    command += ["--output-dir", str(output), "--seq-length", str(args.seq_length), "--parallel_mode", mode]
    command += ["--max-train-steps", str(args.steps), "--gradient-accumulate-every", "1", "--tracker", "none"]
    command += ["--learning-rate", "1e-3", "--warmup-steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        print(done.stderr[-3000:], file=sys.stderr)
        return row | {"error_message": lines[0] if lines else f"exit status {done.returncode}"}
    card = json.loads((output / "easyctx_run.json").read_text())
    first, last = card["first_step"], card["last_step"]
    # Before the first update engines differ by rounding only; afterwards Adam makes much of tiny gradients.
    return row | {
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
        "last_loss": last["loss"],
        "tokens_per_s": last["tokens_per_second"],
        "peak_gpu_gib": last["peak_gib"] if torch.cuda.is_available() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-processes", type=int, default=max(torch.cuda.device_count(), 2))
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--engines", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model_and_data(Path(folder), args.preset, args.seq_length)
        rows = []
        for engine in args.engines:
            for mode in RUNS[engine][1]:
                rows.append(run(args, Path(folder), engine, mode))
                path = write_results("engines", rows, args.output)
    print_table(rows)
    print(path)


if __name__ == "__main__":
    main()
