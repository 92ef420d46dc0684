"""How fast `easyctx data` is on plain text, a core, and how much memory it takes for one and for ten times the text.

    python benchmarks/data_speed.py [--text FOLDER] [--times 1 10] [--num-proc 1] [--repeat 3] [--output FOLDER]

A byte-level BPE of 32,000 tokens is trained on the text first. Each row is a whole run of the command, from files to
rows of 65,536 tokens on disk, in processes of its own, the fastest of `--repeat`; `start` is a run on one line: what
imports, tokenizer, card and picture cost. Seconds of CPU are those of all processes; without the start, tokens by CPU
second are tokens/s a core whatever else the machine does. Ten times the text is ten copies of its files. Memory is what
they are for: their speed is that of words that were all met before, and that of one copy that of words that are new.
The last row is the tokenizer alone, on one thread, without files and rows. Without --text the text is made up.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared_parts.results_file import print_table, write_results

VOCABULARY = 32_000
SEQ_LENGTH = 65_536
FILE_CHARACTERS = 1 << 21


def make_up_text(folder: Path, num_files: int = 7) -> None:
    """Words of random letters, common ones far more often than rare ones, in sentences and paragraphs."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=rng.randint(1, 10)))
        for _ in range(60_000)
    ]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    for number in range(num_files):
        pieces, written = [], 0
        while written < FILE_CHARACTERS:
            sentence = " ".join(rng.choices(words, weights, k=rng.randint(4, 30))).capitalize()
            pieces.append(sentence + rng.choice([". ", ", and so. ", "? ", ".\n", ".\n\n"]))
            written += len(pieces[-1])
        (folder / f"{number}.txt").write_text("".join(pieces), encoding="utf-8")


def train_tokenizer(files: list[Path], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(file) for file in files], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def run_once(text: Path, tokenizer: Path, output: Path, seq_length: int, num_proc: int) -> dict[str, Any]:
    """One run of the command: seconds, CPU seconds, peak memory of its largest process, tokens."""
    command = [sys.executable, "-m", "easyctx.cli", "data", str(text), "--tokenizer", str(tokenizer), "--output"]
    command += [str(output), "--seq-length", str(seq_length), "--num-proc", str(num_proc)]
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)  # with the usage of its own processes
        if status:
            said.seek(0)
            raise RuntimeError(said.read().decode()[-2000:])
    counts = json.loads((output / "easyctx_data.json").read_text(encoding="utf-8"))["counts"]
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "documents": counts["documents"],
        "tokens": counts["tokens"],
    }


def fastest(repeat: int, *arguments: Any) -> dict[str, Any]:
    return min((run_once(*arguments) for _ in range(repeat)), key=lambda run: run["cpu_seconds"])


def alone(repeat: int, files: list[Path], tokenizer: Path) -> dict[str, Any]:
    """The Rust tokenizer by itself on one thread, in pieces as long as `easyctx data` gives it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    from easyctx.data.pieces import cut

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    pieces = [piece for file in files for piece in cut(file.read_text(encoding="utf-8"))]
    tokens, seconds = 0, float("inf")
    for _ in range(repeat):
        started = time.process_time()
        encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encodings)
        seconds = min(seconds, time.process_time() - started)
    return {"what": "tokenizer alone", "tokens": tokens, "cpu_seconds": seconds, "tokens_per_cpu_s": tokens / seconds}


def measure(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    text = scratch / "text_1"
    text.mkdir()
    if args.text is None:
        make_up_text(text)
    else:
        for file in sorted(args.text.rglob("*.txt")):
            shutil.copy(file, text / file.name)
    files = sorted(text.iterdir())
    if not files:
        raise SystemExit(f"error: --text {args.text} holds no .txt file")
    tokenizer = scratch / "tokenizer"
    train_tokenizer(files, tokenizer)
    (scratch / "line.txt").write_text("one line of text, and no more than that\n")
    rows = []
    for num_proc in args.num_proc:
        start = fastest(args.repeat, scratch / "line.txt", tokenizer, scratch / "rows", 4, num_proc)
        rows.append({"what": "start", "num_proc": num_proc} | start)
        for times in args.times:
            folder = scratch / f"text_{times}"
            for copy in range(times if not folder.exists() else 0):
                shutil.copytree(text, folder / str(copy))
            run = fastest(args.repeat, folder, tokenizer, scratch / "rows", SEQ_LENGTH, num_proc)
            run["tokens_per_cpu_s"] = run["tokens"] / (run["cpu_seconds"] - start["cpu_seconds"])
            run["tokens_per_cpu_s_with_start"] = run["tokens"] / run["cpu_seconds"]
            size = times * sum(file.stat().st_size for file in files) / 1e6
            rows.append({"what": f"text x {times}", "num_proc": num_proc, "megabytes": size} | run)
            print(rows[-1], flush=True)
    return [*rows, alone(args.repeat, files, tokenizer)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="folder of .txt files (default: text made up)")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10], help="how often the text is taken")
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1], help="processes that tokenise")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the fastest counts")
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="easyctx_data_speed_") as scratch:
        rows = measure(args, Path(scratch))
    columns = ["what", "num_proc", "megabytes", "documents", "tokens", "seconds", "cpu_seconds", "tokens_per_cpu_s"]
    columns += ["tokens_per_cpu_s_with_start", "peak_mib"]
    print_table([{column: row.get(column) for column in columns} for row in rows])
    print(write_results("data_speed", rows, args.output))


if __name__ == "__main__":
    main()
