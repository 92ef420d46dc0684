"""What a finished run says of itself in its output folder: `easyctx_run.json`, and a model card made from it.

python -m easyctx.training.card OUTPUT_DIR    # writes the card again, with the scores of evals made since
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from easyctx.environment import hardware
from easyctx.training.config import TrainConfig
from easyctx.training.progress import Progress

RUN_CARD, MODEL_CARD, SUMMARY = "easyctx_run.json", "README.md", "summary.json"


def write_run_card(config: TrainConfig, progress: Progress, mesh: str, engine: str) -> None:
    """`easyctx_run.json` (settings, steps, metrics of the first and the last, all stages so far) and the model card."""
    stage = {
        "from": config.model,
        "dataset": config.dataset,
        "seq_length": config.seq_length,
        "rope_theta": config.rope_theta,
        "rope_factor": config.rope_factor,
        "steps": progress.step,
        "sequences": progress.samples,
        "learning_rate": config.learning_rate,
        "mode": config.parallel_mode,
        "mesh": mesh,
        "engine": engine,
        "hardware": hardware(),
        "last_loss": progress.last_metrics.get("loss"),
    }
    card = {
        "config": config.as_dict(),
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "first_step": progress.first_metrics,
        "last_step": progress.last_metrics,
        "stages": [*earlier_stages(config.model), stage],
    }
    _write(Path(config.output_dir) / RUN_CARD, json.dumps(card, indent=2) + "\n")
    write_model_card(Path(config.output_dir))


def earlier_stages(model: str) -> list[dict[str, Any]]:
    """The stages of the run that the start model came from, where that was one of ours."""
    return list(read_run_card(Path(model)).get("stages", []))


def read_run_card(folder: Path) -> dict[str, Any]:
    """The run card of an output folder; empty where there is none."""
    try:
        return dict(json.loads((folder / RUN_CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def is_finished(config: TrainConfig) -> bool:
    """Whether the output folder holds the finished run that `--resume` would go on with."""
    done = read_run_card(Path(config.output_dir))
    return (Path(config.output_dir) / "config.json").exists() and done.get("steps", 0) >= config.max_train_steps


def write_model_card(folder: Path, name: str | None = None) -> None:
    """README.md: where the weights come from, how they were trained, and the scores of evals made of them.

    Its title is `name`, or the folder's.
    """
    card = read_run_card(folder)
    stages = card["stages"]
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = adapter_base(folder)
    lines = [
        "---",
        *(["library_name: transformers"] if base is None else ["library_name: peft", f"base_model: {base}"]),
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {name or folder.resolve().name}",
        "",
        f"A {model_config.get('model_type')} model, trained from `{stages[0]['from']}` for sequences of up to "
        f"{max(stage['seq_length'] for stage in stages):,} tokens with exact full attention (easyctx).",
        "",
        "## Stages",
        "",
        "| tokens a sequence | RoPE base | steps | sequences | learning rate | data | mode, engine | last loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_stage_row(stage) for stage in stages),
        "",
        f"RoPE of these weights: `{json.dumps(model_config.get('rope_parameters'))}`; saved as "
        f"{model_config.get('dtype', model_config.get('torch_dtype'))}. Skipped steps: {card['skipped_steps']}.",
        *([] if base is None else use_of_adapter(base)),
        *_score_lines(folder),
    ]
    _write(folder / MODEL_CARD, "\n".join(lines) + "\n")


def adapter_base(folder: Path) -> str | None:
    """The model under the adapter that a folder holds; None where it holds a whole model."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])


def use_of_adapter(base: str) -> list[str]:
    """How others load the adapter together with the RoPE it was trained with, which its config.json holds."""
    return [
        "",
        "This is an adapter. Its config.json has the RoPE it was trained with, and the base model must be given it:",
        "",
        "```python",
        f'base = AutoModelForCausalLM.from_pretrained("{base}", config=AutoConfig.from_pretrained(FOLDER))',
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "```",
        "",
        "`easyctx eval` takes the folder as it is, and `easyctx merge FOLDER --output DIR` makes whole weights of it.",
    ]


def _stage_row(stage: dict[str, Any]) -> str:
    base = "unchanged" if stage["rope_theta"] is None else f"{stage['rope_theta']:g}"
    loss = "" if stage["last_loss"] is None else f"{stage['last_loss']:.4f}"
    cells = (
        f"{stage['seq_length']:,}",
        base,
        stage["steps"],
        f"{stage['sequences']:,}",
        f"{stage['learning_rate']:g}",
        stage["dataset"],
        f"{stage['mode']}, {stage['mesh']}, {stage['engine']}",
        loss,
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _score_lines(folder: Path) -> list[str]:
    """The scores in the summaries of evals below the folder, or beside it under its name and a suffix."""
    beside = folder.resolve().parent.glob(f"{folder.resolve().name}_*/{SUMMARY}")
    lines = []
    for path in sorted([*folder.glob(f"*/{SUMMARY}"), *beside]):
        summary = json.loads(path.read_text(encoding="utf-8"))
        for label, by_length in summary.get("perplexity", {}).items():
            shown = ", ".join(f"{float(value):.4g} at {int(length):,}" for length, value in by_length.items())
            lines.append(f"- perplexity by tokens, {label}: {shown} (`{path.parent.name}`)")
        if "mean" in summary and "by_length" in summary:
            shown = ", ".join(f"{value['mean']:.1%} at {int(n):,}" for n, value in summary["by_length"].items())
            lines.append(
                f"- {summary.get('label', 'eval')}: {summary['mean']:.1%} right; {shown} (`{path.parent.name}`)"
            )
    return ["", "## Scores", "", *lines] if lines else []


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not read_run_card(Path(argv[0])):
        print("error: give one folder that easyctx.train has written", file=sys.stderr)
        return 2
    write_model_card(Path(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
