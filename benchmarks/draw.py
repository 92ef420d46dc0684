"""Draw the chart of a result file of attention.py or train_step.py again, beside it.

python benchmarks/draw.py benchmarks/results/train_step_1xNVIDIA-H200_20261124.json
"""

import argparse
import json
from pathlib import Path

import attention_parts.chart
import step_parts.chart

CHARTS = {"attention": attention_parts.chart.draw, "train_step": step_parts.chart.draw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    try:
        record = json.loads(path.read_text())
        draw, rows = CHARTS[record["benchmark"]], record["rows"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{path} is no result file of {' or '.join(CHARTS)} ({type(error).__name__}: {error})")
    print(draw(rows, path.with_suffix(".png")) or "no row has figures")


if __name__ == "__main__":
    main()
