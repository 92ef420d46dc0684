"""What a proof consists of: texts, start model, rows, training, evals of every model, controls."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from easyctx.training.card import RUN_CARD
from train_scripts.proof import recipes
from train_scripts.proof.runner import Task

PYTHON = sys.executable
DEPTHS = 11
TOKENS_PER_LINE = 19  # at most, of LongChat's record in the tokens of `start.py`
MAIN = "main"


def proof_tasks(args: argparse.Namespace, content: dict[str, Any]) -> list[Task]:
    """All tasks, in the order of their importance."""
    out = Path(content["output"])
    short, longer = recipes.split(content)
    stages = [*short, *longer]
    begun_from_rows = _read_rows(args, out, stages, longer)
    open_rows = [_rows_of(stage) for stage in stages if _is_open(out / stage["name"])]
    return [
        *_text_tasks(args, out, Path(content["model"]), stages),
        *[_rows_task(args, out, Path(content["model"]), stage) for stage in begun_from_rows],
        _recipe_task(out, MAIN, out / stages[-1]["name"], open_rows, args.processes),
        *_eval_tasks(args, out, [short[-1], *longer]),
        _controls_task(args, out, Path(content["model"])),
        *_control_tasks(args, out, Path(content["model"]), short[-1], longer),
    ]


def _is_open(model: Path) -> bool:
    return not (model / RUN_CARD).exists()


def _read_rows(
    args: argparse.Namespace, out: Path, stages: list[dict[str, Any]], longer: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The stages whose rows a training still needs: on another machine, what is finished needs none again."""
    open_stages = [stage for stage in stages if _is_open(out / stage["name"])]
    of_controls = [("yarn", longer[-1]), ("pose", longer[0])]
    open_stages += [stage for name, stage in of_controls if _is_open(recipes.control_model(out, name))]
    return [stage for stage in stages if stage in open_stages]


def _module(name: str, **flags: Any) -> list[str]:
    words = [PYTHON, "-m", name]
    for flag, value in flags.items():
        words += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _text_tasks(args: argparse.Namespace, out: Path, start: Path, stages: list[dict[str, Any]]) -> list[Task]:
    texts, first = out / "texts", stages[0]["seq_length"]
    proof = "train_scripts.proof"
    sizes = {name: getattr(args, name) for name in ("vocabulary", "hidden", "layers", "head_dim", "rope_theta")}
    tasks = []
    for name, folder in (("train", args.books), ("held_out", args.held_out)):
        command = _module(f"{proof}.texts", input=folder, output=texts / name)
        tasks.append(Task(f"texts_{name}", texts / name / ".made", (), lambda command=command: command))
    training = texts / "train"
    make_start = _module(f"{proof}.start", texts=training, output=start, length=first, **sizes)
    tokenise = [PYTHON, "-m", "easyctx", "data", str(training), "--tokenizer", str(start), "--seq-length", "2048"]
    tokenise += ["--output", str(out / "text")]
    return [
        *tasks,
        Task("start", start / "model.safetensors", (training / ".made",), lambda: make_start),
        Task("text", out / "text" / "easyctx_data.json", (start / "model.safetensors",), lambda: tokenise),
    ]


def _rows_of(stage: dict[str, Any]) -> Path:
    """The file that comes last into its folder of rows."""
    return Path(stage["dataset"]) / "state.json"


def _rows_task(args: argparse.Namespace, out: Path, start: Path, stage: dict[str, Any]) -> Task:
    rows = stage["max_train_steps"] * stage["batch_size"] * stage["gradient_accumulate_every"]
    command = _module(
        "train_scripts.proof.rows",
        text=out / "text",
        tokenizer=start,
        output=stage["dataset"],
        length=stage["seq_length"],
        rows=min(rows, max(1, args.most_tokens // stage["seq_length"])),
        seed=stage.get("seed", 0),
        processes=args.row_processes,
    )
    if args.text_to_answers is not None and stage["seq_length"] >= args.lengths[-1]:
        command += ["--text-to-answers", str(args.text_to_answers)]
    needs = (out / "text" / "easyctx_data.json",)
    return Task(f"rows_{stage['name']}", _rows_of(stage), needs, lambda: command)


def _recipe_task(out: Path, name: str, model: Path, needs: list[Path], gpus: int = 1) -> Task:
    """Training by `easyctx recipe`, up to the model of its last stage."""
    file = out / recipes.FOLDER / f"{name}.yaml"
    command = [PYTHON, "-m", "easyctx", "recipe", str(file)]
    return Task(name, model / RUN_CARD, (file, *needs), lambda: command, gpus)


def _eval_tasks(args: argparse.Namespace, out: Path, stages: list[dict[str, Any]]) -> list[Task]:
    """Needle grid, perplexity and LongChat lines of each stage; the longest-trained model has more samples."""
    tasks = []
    lengths = [stage["seq_length"] for stage in stages]
    for stage in reversed(stages):
        model, length = out / stage["name"], stage["seq_length"]
        samples = args.samples * (2 if length == lengths[-1] else 1)
        tasks += [
            _needle(args, out, stage["name"], model, samples),
            _lines(
                args, out, stage["name"], model, [each["seq_length"] for each in stages if each["seq_length"] <= length]
            ),
            _perplexity(args, out, stage["name"], model),
        ]
    return tasks


def _controls_task(args: argparse.Namespace, out: Path, start: Path) -> Task:
    folder = out / recipes.FOLDER
    command = [PYTHON, "-m", "train_scripts.proof.recipes", str(folder / f"{MAIN}.yaml")]
    command += ["--steps", str(args.parity_steps), "--length", str(args.parity_length)]
    return Task("controls", folder / f"{recipes.NAMES[-1]}.yaml", (start / "model.safetensors",), lambda: command)


def _control_tasks(
    args: argparse.Namespace, out: Path, start: Path, short: dict[str, Any], longer: list[dict[str, Any]]
) -> list[Task]:
    second, last = longer[0], longer[-1]
    base = out / short["name"]
    theta = ["--rope-theta", str(last["rope_theta"])]
    tasks = [
        _needle(args, out, "untrained", base, args.samples, theta),
        _perplexity(args, out, "untrained", base, theta),
    ]
    for name, stage in (("yarn", last), ("pose", second)):
        needs = [base / RUN_CARD, _rows_of(stage)]
        model = recipes.control_model(out, name)
        tasks.append(_recipe_task(out, name, model, needs))
        tasks.append(_needle(args, out, name, model, args.samples))
        tasks.append(_perplexity(args, out, name, model))
    if args.parity:
        rows = {**second, "name": recipes.PARITY, "dataset": out / "rows" / recipes.PARITY, "batch_size": 1}
        rows |= {"seq_length": args.parity_length, "max_train_steps": args.parity_steps}
        tasks.append(_rows_task(args, out, start, rows))
        needs = [base / RUN_CARD, _rows_of(rows)]
        tasks += [
            _recipe_task(out, name, recipes.control_model(out, name), needs, gpus)
            for name, gpus in (("sp1", 1), ("sp2", 2))
        ]
    return tasks


def _eval(out: Path, kind: str, name: str, model: Path, words: list[str], script: str) -> Task:
    """On one GPU: of so small a model, half the time is the start, which several GPUs do not shorten."""
    folder = out / kind / name
    command = [PYTHON, script, "--model", str(model), "--labels", name, "--output", str(folder), "--force", *words]
    return Task(f"{kind}_{name}", folder / "summary.json", (model / RUN_CARD,), lambda: command, gpus=1)


def _needle(
    args: argparse.Namespace, out: Path, name: str, model: Path, samples: int, words: list[str] | None = None
) -> Task:
    grid = ["--haystack", str(out / "texts" / "held_out"), "--lengths", *map(str, args.lengths)]
    grid += ["--depths", str(DEPTHS), "--samples", str(samples), "--depth-by", "place", "--shift-haystack"]
    return _eval(out, "needle", name, model, [*grid, *(words or [])], "eval/needle.py")


def _perplexity(args: argparse.Namespace, out: Path, name: str, model: Path, words: list[str] | None = None) -> Task:
    lengths = ["--data", str(args.long_text or out / "texts" / "held_out"), "--split"]
    # The first tokens of a novel are its table of contents: what is compared must be the same text at every length.
    lengths += ["--window", "last", "--targets", str(args.lengths[0] // 2), "--lengths", *map(str, args.lengths)]
    return _eval(out, "perplexity", name, model, [*lengths, *(words or [])], "eval/perplexity.py")


def _lines(args: argparse.Namespace, out: Path, name: str, model: Path, lengths: list[int]) -> Task:
    sizes = [str(length // TOKENS_PER_LINE) for length in lengths]
    words = ["--task", "lines", "--lines", *sizes, "--samples", str(args.records), "--questions", str(args.questions)]
    return _eval(out, "lines", name, model, words, "eval/longchat.py")
