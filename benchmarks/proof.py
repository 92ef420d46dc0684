"""What a proof found (`python -m train_scripts.proof`): scores by length of every model, losses, figures.

    python benchmarks/proof.py [--recipe train_scripts/proof/proof.yaml]

Reads the runs' own summaries, and needs no GPU. A model that was not evaluated has no row. Every row names the machine
that it comes from, or null where no launch has recorded it, and the result file all that are named.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # for train_scripts

from proof_parts.charts import draw_losses, draw_needles, draw_perplexities
from shared_parts.results_file import RESULTS, print_table, write_results

from easyctx.evals.needle_report import compare
from easyctx.training.card import read_run_card
from train_scripts.proof import recipes
from train_scripts.proof.runner import read_times

CONTROLS = {"untrained": "new base, no training", "yarn": "YaRN", "pose": "PoSE"}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Proof:
    """The results in one output folder."""

    def __init__(self, recipe: Path) -> None:
        self.content = recipes.load(recipe)
        self.out = Path(self.content["output"])
        short, longer = recipes.split(self.content)
        self.short, self.longer = short[-1], longer
        self.stages = [*short, *longer]
        self.models = [self.short["name"], *(stage["name"] for stage in longer), *CONTROLS]

    def what(self, name: str) -> str:
        """What was done to the short model, in words."""
        short, last = self.short["name"], self.longer[-1]["name"]
        card = read_run_card(self.model(name))
        run = f"{card['steps']} steps of {card['config']['seq_length']:,} tokens" if card else ""
        return {
            short: f"{short} as trained, no change of RoPE base",
            "untrained": f"{short} with the RoPE base of {last}, without training",
            "yarn": f"{short} and then YaRN, {run}",
            "pose": f"{short} and then PoSE, {run}",
        }.get(name, f"extended to {name}")

    def label(self, name: str) -> str:
        return CONTROLS.get(name, name)

    def summary(self, kind: str, name: str) -> dict[str, Any]:
        return read_json(self.out / kind / name / "summary.json")

    def rows(self) -> list[dict[str, Any]]:
        """One for each eval, model and length (or number of lines)."""
        found = []
        for name in self.models:
            for kind, curve in (("needle", self.needle_curve(name)), ("lines", self.lines(name))):
                head = self._head(kind, name)
                found += [head | {"size": int(size)} | _score(share) for size, share in curve.items()]
            head = self._head("perplexity", name)
            for point in self.perplexity_curve(name):
                row = head | {"size": point["length"], "score": point["perplexity"]}
                found.append(row | {"low": point["low"], "high": point["high"], "texts": point["num_documents"]})
        return found

    def _head(self, kind: str, name: str) -> dict[str, Any]:
        """Which eval of which model, and on what it ran."""
        machines = [row["hardware"] for row in read_times(self.out) if row["task"] == f"{kind}_{name}"]
        hardware = machines[-1] if machines else None
        return {"eval": kind, "model": name, "what": self.what(name), "hardware": hardware}

    def lines(self, name: str) -> dict[str, Any]:
        models = self.summary("lines", name).get("models", {})
        return dict(models[name]["by_num_lines"]["lines"]) if name in models else {}

    def needle_curve(self, name: str) -> dict[str, Any]:
        by_length = self.summary("needle", name).get("by_length", {})
        return {length: {**share, "num_answers": share["num_prompts"]} for length, share in by_length.items()}

    def perplexity_curve(self, name: str) -> list[dict[str, Any]]:
        return list(self.summary("perplexity", name).get("curves", {}).get(name, []))

    def model(self, name: str) -> Path:
        return recipes.control_model(self.out, name) if name in recipes.NAMES else self.out / name

    def training(self) -> list[dict[str, Any]]:
        """Of each finished run: length, base, steps, first and last loss, tokens a second at the end, seconds."""
        rows = []
        for name in [*(stage["name"] for stage in self.stages), *recipes.NAMES]:
            card = read_run_card(self.model(name))
            if not card:
                continue
            config, last = card["config"], card["last_step"]
            row = {"eval": "training", "model": name, "size": config["seq_length"], "steps": card["steps"]}
            row |= {key: config[key] for key in ("rope_theta", "rope_factor", "pose_length", "parallel_mode")}
            row |= {"tokens": config["seq_length"] * card["stages"][-1]["sequences"]}
            row |= {"first_loss": card["first_step"]["loss"], "last_loss": last["loss"]}
            row |= {"seconds": self.seconds(name)}
            row |= {"tokens_per_second": last["tokens_per_second"], "peak_gib": last["peak_gib"]}
            rows.append(row | {"hardware": self.where(name)})
        return rows

    def seconds(self, name: str) -> list[float]:
        """Of each launch of a stage, other commands running beside it. Earlier ones were stopped or failed."""
        launches = read_json(self.model(name).parent / "recipe.json").get("launches", {}).get(name, [])
        return [round(launch.get("seconds", 0.0), 1) for launch in launches]

    def versions(self) -> dict[str, str] | None:
        """Under which the longest-trained model was evaluated."""
        found = [self.summary("needle", name).get("versions") for name in self.models]
        return next((each for each in reversed(found) if each), None)

    def where(self, name: str) -> str | None:
        """On what a run was trained, the last time that it went on."""
        stages = read_run_card(self.model(name)).get("stages", [])
        return stages[-1].get("hardware") if stages else None

    def losses(self, name: str) -> list[float]:
        """The loss of each step of a run, from its tensorboard log."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logs = self.model(name) / "easyctx"
        if not logs.is_dir():
            return []
        events = EventAccumulator(str(logs))
        events.Reload()
        return [event.value for event in events.Scalars("loss")] if "loss" in events.Tags()["scalars"] else []


def _score(share: dict[str, Any]) -> dict[str, Any]:
    low, high = share["interval"] or (None, None)
    return {"score": share["mean"], "low": low, "high": high, "answers": share["num_answers"]}


def machines_of(rows: list[dict[str, Any]]) -> str | None:
    """All that took part, in the order of the rows; None where no row names one."""
    return "+".join(dict.fromkeys(row["hardware"] for row in rows if row["hardware"])) or None


def draw(proof: Proof, folder: Path) -> list[Path]:
    """Needles and perplexity by length, needles by depth, the losses of one and two processes; of what there is."""
    stages, controls = proof.models[: -len(CONTROLS)], list(CONTROLS)
    panels = {"after each stage": stages, "controls beside the last stage": [stages[-1], *controls]}
    made = []
    for name, curve_of, drawn in (
        ("needle", proof.needle_curve, draw_needles),
        ("perplexity", proof.perplexity_curve, draw_perplexities),
    ):
        found = {
            what: {proof.label(model): curve for model in models if (curve := curve_of(model))}
            for what, models in panels.items()
        }
        if there := {what: curves for what, curves in found.items() if curves}:
            made.append(folder / f"proof_{name}.png")
            drawn(made[-1], there)
    beside = [stages[0], *controls] if any(map(proof.needle_curve, controls)) else []
    for name, models in (("heatmaps", stages), ("heatmaps_controls", beside)):
        folders = {proof.label(model): proof.out / "needle" / model for model in models if proof.needle_curve(model)}
        if folders:
            made.append(folder / f"proof_{name}.png")
            compare(made[-1], folders, None)
    one, two = proof.losses("sp1"), proof.losses("sp2")
    if one and two:
        made.append(folder / "proof_sp.png")
        draw_losses(made[-1], one, two)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("train_scripts/proof/proof.yaml"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file and the pictures")
    args = parser.parse_args()
    proof = Proof(args.recipe)
    rows = [*proof.training(), *proof.rows()]
    if not rows:
        parser.error(f"{proof.out} holds no results: run `python -m train_scripts.proof` first")
    args.output.mkdir(parents=True, exist_ok=True)
    losses = [
        {"eval": "losses", "model": name, "hardware": proof.where(name), "losses": found}
        for name in ("sp1", "sp2")
        if (found := proof.losses(name))
    ]
    scored = [row for row in rows if row["eval"] != "training"]
    print_table(proof.training() or rows)
    if scored:
        print_table(scored, ["eval", "model", "size", "score", "low", "high", "answers"])
    pictures = draw(proof, args.output)
    rows += losses
    file = write_results("proof", rows, args.output, machines_of(rows), proof.versions())
    print("\n".join(map(str, [*pictures, file])))


if __name__ == "__main__":
    main()
