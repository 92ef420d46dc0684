"""Do our scorers give the scores that others published with their predictions?

    python benchmarks/published_scores.py LongChat/longeval/evaluation/lines/predictions/*/*_response.txt

Takes files as LongChat's `longeval/eval.py` writes them (github.com/DachengLi1/LongChat): for each prompt a line
"Label: NUMBER, Predict: ANSWER, Parsed: NUMBER, prompt length: TOKENS", and "Accuracy: SHARE" at the end. The answers
are scored as `eval/longchat.py --task lines --score-only` scores them, and the mean is compared with the last line.
Nothing is downloaded, and nothing of the files is kept but their names and scores.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from results_file import print_table, write_results

from easyctx.evals.tasks.longchat_prompts import read_predictions

ROW = re.compile(r"Label: (?P<label>\d+), Predict: (?P<answer>.*), Parsed: (?P<parsed>-?\d+), prompt length: -?\d+")
ACCURACY = re.compile(r"Accuracy: (?P<share>[\d.]+)")
SOURCE = "github.com/DachengLi1/LongChat, longeval/evaluation/lines/predictions/"


def row_of(file: Path) -> dict[str, Any]:
    """The published and our own score of a file. Raises ValueError for a line of another form, and for no score."""
    *lines, last = file.read_text(encoding="utf-8").strip().split("\n")
    published = ACCURACY.fullmatch(last)
    if published is None:
        raise ValueError(f"{file}: its last line is no 'Accuracy: SHARE' but {last[:60]!r}: give a whole file")
    found = []
    for number, line in enumerate(lines, start=1):
        if (match := ROW.fullmatch(line)) is None:
            raise ValueError(f"{file} line {number} is not of the form 'Label: …, Predict: …': {line[:60]!r}")
        found.append(match)
    scores = scores_of([(match["answer"], match["label"]) for match in found])
    theirs = [float(match["parsed"] == match["label"]) for match in found]
    share = sum(scores) / len(scores)
    return {
        "eval": "longchat lines",
        "source": SOURCE + "/".join(file.parts[-2:]),
        "predictions": len(scores),
        "published": float(published["share"]),
        "ours": share,
        "same": round(share, 10) == float(published["share"]),
        "answers_scored_otherwise": sum(a != b for a, b in zip(scores, theirs, strict=True)),
    }


def scores_of(pairs: list[tuple[str, str]]) -> list[float]:
    """Of (answer, expected number), by the file that `--score-only` would be given."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.jsonl"
        rows = ({"prediction": answer, "expected_number": int(label)} for answer, label in pairs)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [row["score"] for row in read_predictions(file, "lines", "published")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="X_response.txt")
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args(argv)
    try:
        rows = [row_of(file) for file in args.files]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print_table(rows)
    print(write_results("published_scores", rows, args.output))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
