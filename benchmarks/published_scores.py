"""Do our scorers give the scores that others published with their predictions?

    python benchmarks/published_scores.py LongChat/longeval/evaluation/lines/predictions/*/*_response.txt \\
        --f1 LEval/Predictions/ngram_eval/turbo-16k-0613/narrative_qa.pred.jsonl 18.20

Files of LongChat's line retrieval (github.com/DachengLi1/LongChat, as its `longeval/eval.py` writes them) have for each
prompt a line "Label: NUMBER, Predict: ANSWER, Parsed: NUMBER, prompt length: TOKENS", and end with "Accuracy: SHARE".
Files of L-Eval's questions on books (github.com/OpenLMLab/LEval) have for each a JSON object with `gt` and `..._pred`;
their F1 in percent is in `Leaderboard/f1_LEval_leaderboard.csv`, and is given beside the file. The answers are scored
as `eval/longchat.py --task lines` and `eval/narrativeqa.py` do with `--score-only`.
Nothing is downloaded, and nothing of the files is kept but their names and scores.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared_parts.results_file import print_table, write_results

from easyctx.evals.tasks import longchat_prompts, narrativeqa_data
from easyctx.evals.tasks.predictions import read_records

LINE = re.compile(r"Label: (?P<label>\d+), Predict: (?P<answer>.*), Parsed: -?\d+, prompt length: -?\d+")
ACCURACY = re.compile(r"Accuracy: (?P<share>[\d.]+)")


def of_longchat(file: Path) -> dict[str, Any]:
    """The published and our own score of a file. Raises ValueError for a line of another form, and for no score."""
    *lines, last = file.read_text(encoding="utf-8").strip().split("\n")
    published = ACCURACY.fullmatch(last)
    if published is None:
        raise ValueError(f"{file}: its last line is no 'Accuracy: SHARE' but {last[:60]!r}: give a whole file")
    rows = []
    for number, line in enumerate(lines, start=1):
        if (match := LINE.fullmatch(line)) is None:
            raise ValueError(f"{file} line {number} is not of the form 'Label: …, Predict: …': {line[:60]!r}")
        rows.append({"prediction": match["answer"], "expected_number": int(match["label"])})
    scores = scores_of(rows, lambda own: longchat_prompts.read_predictions(own, "lines", "published"))
    source = "github.com/DachengLi1/LongChat, longeval/evaluation/lines/predictions"
    return compared("longchat lines", source, file, scores, published["share"], 1)


def of_leval(file: Path, published: str) -> dict[str, Any]:
    """The same for a file whose score stands elsewhere. Raises ValueError for a row without question or answer."""
    rows = []
    for place, row in read_records(file):
        answer = next((row[name] for name in row if name.endswith("_pred")), None)
        if not isinstance(answer, str) or "gt" not in row:
            raise ValueError(f"{place} has no gt or no ..._pred; it has {', '.join(row)}")
        rows.append({"prediction": answer, "references": [row["gt"]]})
    scores = scores_of(rows, lambda own: narrativeqa_data.read_predictions(own, "published", {}))
    source = "github.com/OpenLMLab/LEval, Predictions/ngram_eval"
    return compared("narrativeqa F1", source, file, scores, published, 100)


def compared(name: str, source: str, file: Path, scores: list[float], published: str, scale: int) -> dict[str, Any]:
    """A row: the published figure, and ours rounded to as many digits."""
    ours, digits = scale * sum(scores) / len(scores), len(published.partition(".")[2])
    return {
        "eval": name,
        "source": f"{source}/{'/'.join(file.parts[-2:])}",
        "predictions": len(scores),
        "published": published,
        "ours": ours,
        "same": f"{ours:.{digits}f}" == published,
    }


def scores_of(rows: list[dict[str, Any]], read: Callable[[Path], list[dict[str, Any]]]) -> list[float]:
    """By the file that `--score-only` would be given."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "predictions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [row["score"] for row in read(file)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="LongChat's NUMBER_response.txt")
    parser.add_argument("--f1", nargs=2, action="append", default=[], metavar=("FILE", "PERCENT"), help="of L-Eval")
    parser.add_argument("--output", type=Path, default=None, help="folder of the result file")
    args = parser.parse_args(argv)
    try:
        rows = [of_longchat(file) for file in args.files]
        rows += [of_leval(Path(file), published) for file, published in args.f1]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not rows:
        parser.error("no file was given")
    print_table(rows)
    print(write_results("published_scores", rows, args.output))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
