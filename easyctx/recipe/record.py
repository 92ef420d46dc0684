"""What a recipe has done so far: `recipe.json` and the same as a table, `recipe.md`, in its output folder."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

from easyctx.evals.results import write_json, write_text
from easyctx.recipe.read import Recipe, Stage
from easyctx.training.card import read_run_card

RECORD, TABLE = "recipe.json", "recipe.md"
COLUMNS = ("stage", "length", "RoPE base", "steps", "tokens", "first loss", "last loss", "seconds", "state")


class Record:
    """The commands that were run, kept over interruptions; figures come from the run card of each stage."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.path = recipe.output / RECORD
        self.launches: dict[str, list[dict[str, Any]]] = {}
        if self.path.exists():
            try:
                self.launches = dict(json.loads(self.path.read_text(encoding="utf-8"))["launches"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path} is no record of a recipe: move it away; it only tells of times"
                ) from None

    def begin(self, name: str, command: str) -> None:
        """Write down a command that is about to run, under the name of its stage."""
        entry = {"command": command, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        self.launches.setdefault(name, []).append(entry)
        self._since = time.monotonic()
        self.write()

    def end(self, name: str, status: int | str) -> None:
        """Its exit status, or the signal that ended it."""
        self.launches[name][-1] |= {"status": status, "seconds": round(time.monotonic() - self._since, 1)}
        self.write()

    def forget(self, names: list[str]) -> None:
        """Stages that are begun anew."""
        for name in names:
            self.launches.pop(name, None)
        self.write()

    def rows(self) -> list[dict[str, Any]]:
        return [self._row(stage) for stage in self.recipe.stages]

    def _row(self, stage: Stage) -> dict[str, Any]:
        card, launches = read_run_card(stage.output), self.launches.get(stage.name, [])
        sequences = card["stages"][-1]["sequences"] if card else None
        known = [launch["seconds"] for launch in launches if "seconds" in launch]
        return {
            "stage": stage.name,
            "seq_length": stage.config.seq_length,
            "rope_theta": stage.config.rope_theta,
            "rope_factor": stage.config.rope_factor,
            "steps": card.get("steps"),
            "tokens": None if sequences is None else sequences * stage.config.seq_length,
            "first_loss": card.get("first_step", {}).get("loss"),
            "last_loss": card.get("last_step", {}).get("loss"),
            "seconds": round(sum(known), 1) if known else None,
            "state": "finished" if card else "begun" if launches else "to do",
        }

    def write(self) -> None:
        """Both files, each whole."""
        self.recipe.output.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        result: dict[str, Any] = {
            "recipe": self.recipe.file,
            "model": self.recipe.model,
            "final": str(self.recipe.final),
        }
        result["final_rope_theta"] = self.recipe.final_rope_theta
        write_json(self.path, {**result, "stages": rows, "launches": self.launches})
        write_text(self.path.with_name(TABLE), "\n".join([f"# {self.recipe.file}", "", *table(rows)]) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown. Seconds are of all launches of a stage, with what an interrupted one had to repeat."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in rows:
        base = "unchanged" if row["rope_theta"] is None else f"{row['rope_theta']:g}"
        if row["rope_factor"] is not None:
            base += f", YaRN x {row['rope_factor']:g}"
        cells = [row["stage"], f"{row['seq_length']:,}", base]
        cells += [_shown(row[name], ",") for name in ("steps", "tokens")]
        cells += [_shown(row[name], ".4f") for name in ("first_loss", "last_loss")]
        lines.append(f"| {' | '.join([*cells, _shown(row['seconds'], ',.1f'), row['state']])} |")
    return lines


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
