"""What a proof found (`python -m train_scripts.proof`): scores by length of every model, losses, figures.

    python benchmarks/proof.py [--recipe train_scripts/proof/proof.yaml]

Reads the runs' own summaries, and needs no GPU. A model that was not evaluated has no row.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # for train_scripts

from shared_parts.results_file import RESULTS, print_table, write_results

from easyctx.evals.charts import score_curves
from easyctx.evals.needle_report import compare
from easyctx.evals.plots import perplexity_curves, pyplot, save_figure
from easyctx.training.card import read_run_card
from train_scripts.proof import recipes
from train_scripts.proof.graph import MAIN
from train_scripts.proof.runner import read_times

CONTROLS = {"untrained": "no training", "yarn": "YaRN", "pose": "PoSE"}


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
            what = self.what(name)
            for length, share in self.summary("needle", name).get("by_length", {}).items():
                found.append({"eval": "needle", "model": name, "what": what, "size": int(length), **_score(share)})
            for point in self.summary("perplexity", name).get("curves", {}).get(name, []):
                row = {"eval": "perplexity", "model": name, "what": what, "size": point["length"]}
                found.append({**row, "score": point["perplexity"], "low": point["low"], "high": point["high"]})
            for lines, share in self.lines(name).items():
                found.append({"eval": "lines", "model": name, "what": what, "size": int(lines), **_score(share)})
        return found

    def lines(self, name: str) -> dict[str, Any]:
        models = self.summary("lines", name).get("models", {})
        return dict(models[name]["by_num_lines"]["lines"]) if name in models else {}

    def needle_curve(self, name: str) -> dict[str, Any]:
        by_length = self.summary("needle", name).get("by_length", {})
        return {length: {**share, "num_answers": share["num_prompts"]} for length, share in by_length.items()}

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
            row |= {"first_loss": card["first_step"]["loss"], "last_loss": last["loss"], "seconds": self.seconds(name)}
            row |= {"tokens_per_second": last["tokens_per_second"], "peak_gib": last["peak_gib"]}
            rows.append(row | {"hardware": self.where(name)})
        return rows

    def seconds(self, name: str) -> float:
        """Of all launches of a stage, other commands running beside it."""
        launches = read_json(self.model(name).parent / "recipe.json").get("launches", {}).get(name, [])
        return round(sum(launch.get("seconds", 0.0) for launch in launches), 1)

    def hardware(self) -> str | None:
        """Where most of the tasks ran."""
        machines = [row["hardware"] for row in read_times(self.out)]
        return max(set(machines), key=machines.count, default=None)

    def versions(self) -> dict[str, str] | None:
        """Under which the longest-trained model was evaluated."""
        found = [self.summary("needle", name).get("versions") for name in self.models]
        return next((each for each in reversed(found) if each), None)

    def where(self, name: str) -> str | None:
        """On what a run was trained, the last time that it went on."""
        task = name if name in recipes.NAMES else MAIN
        return next((row["hardware"] for row in reversed(read_times(self.out)) if row["task"] == task), self.hardware())

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
    return {"score": share["mean"], "low": low, "high": high}


def draw(proof: Proof, folder: Path) -> list[Path]:
    """One picture each: needle by length, heatmaps, perplexity, lines, and the losses of one and two processes."""
    made = []
    needle = {proof.label(name): proof.needle_curve(name) for name in proof.models}
    lines = {proof.label(name): proof.lines(name) for name in proof.models}
    for name, curves, title, across in (
        ("needle", needle, "Needle in a haystack: mean over depths", "length (tokens)"),
        ("lines", lines, "LongChat lines: the number in one of many lines", "lines in the record"),
    ):
        if there := {label: curve for label, curve in curves.items() if curve}:
            made.append(folder / f"proof_{name}.png")
            score_curves(made[-1], there, title, across)
    heatmaps = {
        proof.label(name): proof.out / "needle" / name for name in proof.models if proof.summary("needle", name)
    }
    if heatmaps:
        made.append(folder / "proof_heatmaps.png")
        compare(made[-1], heatmaps, None)
    found = {name: proof.summary("perplexity", name).get("curves", {}).get(name) for name in proof.models}
    if perplexity := {proof.label(name): curve for name, curve in found.items() if curve}:
        made.append(folder / "proof_perplexity.png")
        what = "the same last tokens of each part, behind more and more of it"
        perplexity_curves(made[-1], perplexity, "Perplexity of held-out novels, by length", what)
    one, two = proof.losses("sp1"), proof.losses("sp2")
    if one and two:
        made.append(folder / "proof_sp.png")
        draw_losses(made[-1], one, two)
    return made


def draw_losses(path: Path, one: list[float], two: list[float]) -> None:
    plt = pyplot()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.2, 5.2), layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    steps = range(1, len(one) + 1)
    above.plot(steps, one, label="one process", linewidth=4, alpha=0.4)
    above.plot(range(1, len(two) + 1), two, label="zigzag ring of two", linewidth=1.2, color="black")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    differences = [abs(a - b) for a, b in zip(one, two, strict=False)]
    below.plot(range(1, len(differences) + 1), differences, marker="o", ms=3)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.suptitle("The same extension with the sequence on one and on two processes", fontsize=11, fontweight="bold")
    save_figure(plt, figure, path)


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
        print_table(scored, ["eval", "model", "size", "score", "low", "high"])
    pictures = draw(proof, args.output)
    file = write_results("proof", [*rows, *losses], args.output, proof.hardware(), proof.versions())
    print("\n".join(map(str, [*pictures, file])))


if __name__ == "__main__":
    main()
