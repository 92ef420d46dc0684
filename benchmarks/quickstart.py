"""The quickstart over several seeds: needle score and perplexity by length, before and after the extension.

    python benchmarks/quickstart.py --seeds 0 1 2 [--output FOLDER]

Runs `train_scripts/quickstart.sh` once for each seed and keeps the pictures of the first.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from shared_parts.results_file import RESULTS, print_table, write_results

ROOT = Path(__file__).parent.parent
PICTURES = {
    "needle_before": "needle_before/needle.png",
    "needle_after": "needle_after/needle.png",
    "perplexity": "perplexity/perplexity.png",
}


def run(seed: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each length of one run."""
    command = ["bash", str(ROOT / "train_scripts" / "quickstart.sh"), "--seed", str(seed), "--output", str(folder)]
    subprocess.run(command, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    scores = ("needle_before", "needle_after", "perplexity_before", "perplexity_after")
    return [
        {"seed": seed, "length": int(length), **{name: summary[name][length] for name in scores}}
        | {"seconds": summary["seconds"]}
        for length in summary["needle_after"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file and the pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)  # before half an hour of work, not after it
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        for seed in args.seeds:
            folder = Path(parent) / str(seed)
            rows += run(seed, folder)
            if seed == args.seeds[0]:
                for name, picture in PICTURES.items():
                    shutil.copy(folder / picture, args.output / f"quickstart_{name}.png")
    print_table(rows)
    print(write_results("quickstart", rows, args.output))


if __name__ == "__main__":
    main()
